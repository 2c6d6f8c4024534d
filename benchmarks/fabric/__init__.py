"""A cluster on one machine: a network namespace per rank, a bridge per node, uplinks of a chosen rate and delay.

layout (pure: names, addresses, rates) · network (makes and removes it) · job (runs a command as every rank) · meter (what
crossed each uplink) · relay.c and meter.c (delay and counting, outside of Python).
"""
