// Carries packets between two tap devices, each `delay_ns` after it came: the kernel's netem is not everywhere.
//
//   relay NETNS_A TAP_A NETNS_B TAP_B DELAY_NS
//
// One thread per direction reads into a ring and stamps the time, another writes each packet when its time has come.
// A full ring drops what comes, as a switch does.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { SLOTS = 4096, PACKET_BYTES = 65600 };

struct packet {
  int64_t due_ns;
  ssize_t bytes;
  uint8_t *data;
};

struct direction {
  int from, to;
  int64_t delay_ns;
  struct packet *ring;
  _Atomic uint64_t written, read;
};

static void fail(const char *what) {
  fprintf(stderr, "relay: %s: %s\n", what, strerror(errno));
  exit(1);
}

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int open_tap(const char *netns, const char *name) {
  int space = open(netns, O_RDONLY | O_CLOEXEC);
  if (space < 0 || setns(space, CLONE_NEWNET)) fail(netns);
  close(space);
  int tap = open("/dev/net/tun", O_RDWR | O_CLOEXEC);
  if (tap < 0) fail("/dev/net/tun");
  struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI};
  strncpy(request.ifr_name, name, IFNAMSIZ - 1);
  if (ioctl(tap, TUNSETIFF, &request)) fail(name);
  return tap;
}

static void *take_in(void *argument) {
  struct direction *d = argument;
  uint8_t spare[PACKET_BYTES];
  for (;;) {
    const uint64_t written = atomic_load_explicit(&d->written, memory_order_relaxed);
    const int is_full =
        written - atomic_load_explicit(&d->read, memory_order_acquire) == SLOTS;
    struct packet *p = &d->ring[written % SLOTS];
    const ssize_t bytes = read(d->from, is_full ? spare : p->data, PACKET_BYTES);
    if (bytes < 0 && errno != EINTR && errno != EAGAIN && errno != EIO) fail("read");
    if (bytes <= 0 || is_full) continue;
    p->bytes = bytes;
    p->due_ns = now_ns() + d->delay_ns;
    atomic_store_explicit(&d->written, written + 1, memory_order_release);
  }
  return NULL;
}

static void *give_out(void *argument) {
  struct direction *d = argument;
  for (;;) {
    const uint64_t next = atomic_load_explicit(&d->read, memory_order_relaxed);
    if (next == atomic_load_explicit(&d->written, memory_order_acquire)) {
      // Nothing can be due sooner than a tenth of the delay from now.
      const struct timespec pause = {0, d->delay_ns / 10 < 50000 ? d->delay_ns / 10 : 50000};
      clock_nanosleep(CLOCK_MONOTONIC, 0, &pause, NULL);
      continue;
    }
    struct packet *p = &d->ring[next % SLOTS];
    const struct timespec due = {p->due_ns / 1000000000, p->due_ns % 1000000000};
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, NULL);
    // A device that is down or full loses the packet; TCP sends it again.
    if (write(d->to, p->data, p->bytes) < 0 && errno == EBADFD) fail("write");
    atomic_store_explicit(&d->read, next + 1, memory_order_release);
  }
  return NULL;
}

int main(int argc, char **argv) {
  if (argc != 6) {
    fprintf(stderr, "usage: relay NETNS_A TAP_A NETNS_B TAP_B DELAY_NS\n");
    return 2;
  }
  prctl(PR_SET_TIMERSLACK, 1UL);
  const int a = open_tap(argv[1], argv[2]);
  const int b = open_tap(argv[3], argv[4]);
  const int64_t delay_ns = atoll(argv[5]);
  static struct direction directions[2];
  pthread_t threads[4];
  for (int i = 0; i < 2; ++i) {
    struct direction *d = &directions[i];
    d->from = i ? b : a;
    d->to = i ? a : b;
    d->delay_ns = delay_ns;
    d->ring = calloc(SLOTS, sizeof *d->ring);
    if (!d->ring) fail("memory");
    for (int s = 0; s < SLOTS; ++s)
      if (!(d->ring[s].data = malloc(PACKET_BYTES))) fail("memory");
    if (pthread_create(&threads[2 * i], NULL, take_in, d) ||
        pthread_create(&threads[2 * i + 1], NULL, give_out, d))
      fail("threads");
  }
  pthread_join(threads[0], NULL);
  return 1;
}
