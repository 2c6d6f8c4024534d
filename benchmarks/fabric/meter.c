// Counts the TCP payload that leaves each node through its uplink, flow by flow and exactly.
//
//   meter SOCKET DEVICE NETNS_HOME NETNS...
//
// A flow's bytes are how far its sequence numbers went, so a packet that is sent again, cut or merged counts once.
// Whoever connects to SOCKET gets a line per flow, `node source port destination port bytes`, and the connection is closed.
// The process stays in NETNS_HOME.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <netinet/ip.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { MAX_NODES = 64, MAX_FLOWS = 1 << 16, HEADER_BYTES = 128, QUEUE_BYTES = 1 << 25 };

struct flow {
  int node;
  uint32_t source, destination;
  uint16_t source_port, destination_port;
  uint32_t end;  // sequence number after the last byte seen
  uint64_t bytes;
  int is_used;
};

static struct flow flows[MAX_FLOWS];

static void fail(const char *what) {
  fprintf(stderr, "meter: %s: %s\n", what, strerror(errno));
  exit(1);
}

static void enter(const char *netns) {
  int space = open(netns, O_RDONLY | O_CLOEXEC);
  if (space < 0 || setns(space, CLONE_NEWNET)) fail(netns);
  close(space);
}

static int listen_on(const char *netns, const char *device) {
  enter(netns);
  int packets = socket(AF_PACKET, SOCK_DGRAM | SOCK_CLOEXEC, htons(ETH_P_ALL));
  if (packets < 0) fail("packet socket");
  struct sockaddr_ll where = {.sll_family = AF_PACKET,
                              .sll_protocol = htons(ETH_P_ALL),
                              .sll_ifindex = (int)if_nametoindex(device)};
  if (bind(packets, (struct sockaddr *)&where, sizeof where)) fail(device);
  const int bytes = QUEUE_BYTES;
  setsockopt(packets, SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof bytes);
  return packets;
}

static struct flow *find(int node, const struct iphdr *ip, const struct tcphdr *tcp) {
  uint32_t hash = ip->saddr * 2654435761u ^ ip->daddr * 40503u;
  hash ^= ((uint32_t)tcp->source << 16 | tcp->dest) * 2246822519u;
  hash ^= hash >> 15;
  for (uint32_t i = 0; i < MAX_FLOWS; ++i) {
    struct flow *f = &flows[(hash + i) % MAX_FLOWS];
    if (!f->is_used) {
      *f = (struct flow){.node = node,
                         .source = ip->saddr,
                         .destination = ip->daddr,
                         .source_port = tcp->source,
                         .destination_port = tcp->dest,
                         .end = ntohl(tcp->seq) + tcp->syn,
                         .is_used = 1};
      return f;
    }
    if (f->node == node && f->source == ip->saddr && f->destination == ip->daddr &&
        f->source_port == tcp->source && f->destination_port == tcp->dest)
      return f;
  }
  errno = ENOMEM;
  fail("flows");
  return NULL;
}

// Until the queue is empty, so that whoever asks afterwards is told of all that has passed.
static void count(int node, int packets) {
  _Alignas(8) uint8_t header[HEADER_BYTES];
  struct sockaddr_ll from;
  for (;;) {
    socklen_t length = sizeof from;
    const ssize_t got = recvfrom(packets, header, sizeof header, MSG_TRUNC | MSG_DONTWAIT,
                                 (struct sockaddr *)&from, &length);
    if (got < 0) return;
    const struct iphdr *ip = (const void *)header;
    if (from.sll_pkttype != PACKET_OUTGOING || from.sll_protocol != htons(ETH_P_IP) ||
        got < (ssize_t)sizeof *ip || ip->protocol != IPPROTO_TCP || ip->ihl * 4 + 20 > HEADER_BYTES)
      continue;
    const struct tcphdr *tcp = (const void *)(header + ip->ihl * 4);
    struct flow *f = find(node, ip, tcp);
    // The port pair of a flow that ended may come again.
    if (tcp->syn) f->end = ntohl(tcp->seq) + 1;
    // Of a packet above 64 KiB the header has no length.
    const ssize_t total = ip->tot_len ? ntohs(ip->tot_len) : got;
    const uint32_t end = ntohl(tcp->seq) + tcp->syn + (uint32_t)(total - ip->ihl * 4 - tcp->doff * 4);
    const int32_t ahead = (int32_t)(end - f->end);
    if (ahead > 0) {
      f->bytes += (uint32_t)ahead;
      f->end = end;
    }
    if (tcp->fin && f->end == end) ++f->end;  // takes a number, is no byte
  }
}

static void tell(int door) {
  const int caller = accept(door, NULL, NULL);
  FILE *out = caller < 0 ? NULL : fdopen(caller, "w");
  if (!out) return;
  char source[INET_ADDRSTRLEN], destination[INET_ADDRSTRLEN];
  for (int i = 0; i < MAX_FLOWS; ++i) {
    const struct flow *f = &flows[i];
    if (!f->is_used) continue;
    inet_ntop(AF_INET, &f->source, source, sizeof source);
    inet_ntop(AF_INET, &f->destination, destination, sizeof destination);
    fprintf(out, "%d %s %u %s %u %llu\n", f->node, source, ntohs(f->source_port), destination,
            ntohs(f->destination_port), (unsigned long long)f->bytes);
  }
  fclose(out);
}

int main(int argc, char **argv) {
  const int nodes = argc - 4;
  if (nodes < 1 || nodes > MAX_NODES) {
    fprintf(stderr, "usage: meter SOCKET DEVICE NETNS_HOME NETNS...\n");
    return 2;
  }
  struct pollfd sources[MAX_NODES + 1];
  for (int n = 0; n < nodes; ++n)
    sources[n] = (struct pollfd){.fd = listen_on(argv[4 + n], argv[2]), .events = POLLIN};
  enter(argv[3]);
  const int door = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  strncpy(address.sun_path, argv[1], sizeof address.sun_path - 1);
  if (door < 0 || bind(door, (struct sockaddr *)&address, sizeof address) || listen(door, 8))
    fail(argv[1]);
  sources[nodes] = (struct pollfd){.fd = door, .events = POLLIN};
  for (;;) {
    if (poll(sources, (nfds_t)nodes + 1, -1) < 0 && errno != EINTR) fail("poll");
    const int is_asked = sources[nodes].revents;
    for (int n = 0; n < nodes; ++n)
      if (sources[n].revents || is_asked) count(n, sources[n].fd);
    if (is_asked) tell(door);
  }
}
