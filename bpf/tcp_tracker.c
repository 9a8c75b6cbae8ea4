// SPDX-License-Identifier: GPL-2.0-only
/*
 * Keeps the map of the TCP connections that are in state ESTABLISHED, told by
 * the tracepoint sock:inet_sock_set_state. The loader defines:
 *
 * MAX_CONNECTIONS    how many entries each map can hold
 * MAP_FLAGS          BPF_F_NO_PREALLOC, or 0
 * NETNS              inode of the only network namespace to watch, 0: all
 * LOSE_ONE_IN        in tests, how many events one is lost of, by chance
 * SKC_NET_OFFSET     of sock_common.skc_net  } from the running kernel's BTF,
 * NETNS_INUM_OFFSET  of net.ns.inum          } or neither, without BTF
 */
#include "tcp_tracker.h"

#define IPPROTO_TCP 6
#define TCP_ESTABLISHED 1
#define TCP_SYN_SENT 2

/* Of a field of the record: read it by words, which takes an aligned one. */
#define WORDS(field) __builtin_assume_aligned(field, 8)

/* Told by the tracepoint. Only this program adds to it. */
BPF_F_TABLE("hash", struct connection_key, struct connection_value, tracked,
	    MAX_CONNECTIONS, MAP_FLAGS);

/*
 * Found in the socket tables: established before the program was attached.
 * Only userspace adds to it, so it can do so in bulk without ever overwriting
 * a timestamp that the kernel gave.
 */
BPF_F_TABLE("hash", struct connection_key, struct connection_value, seeded,
	    MAX_CONNECTIONS, MAP_FLAGS);

BPF_PERCPU_ARRAY(events, struct tracker_events, 1);

static __u32 netns_of(const void *socket)
{
#ifdef SKC_NET_OFFSET
	const void *net = NULL;
	__u32 inum = 0;

	bpf_probe_read_kernel(&net, sizeof(net), socket + SKC_NET_OFFSET);
	bpf_probe_read_kernel(&inum, sizeof(inum), net + NETNS_INUM_OFFSET);
	return inum;
#else
	return 0;
#endif
}

static void opened(struct connection_key *key, __u32 socket, int oldstate,
		   struct tracker_events *count)
{
	struct connection_value value = {};

	value.established_ns = bpf_ktime_get_boot_ns();
	value.socket = socket;
	value.direction =
	    oldstate == TCP_SYN_SENT ? DIRECTION_OUTBOUND : DIRECTION_INBOUND;
	if (tracked.update(key, &value))
		count->refused++;
	else
		count->inserted++;
	/* A seed whose close was missed has no part in its successor's age. */
	if (seeded.lookup(key))
		seeded.delete(key);
}

static void closed(struct connection_key *key, __u32 socket,
		   struct tracker_events *count)
{
	struct connection_value *value = tracked.lookup(key);

	if (!value) {
		seeded.delete(key);
		return;
	}
	/*
	 * The kernel unhashes a socket before it tells of its close. On another
	 * CPU the address pair may have been established anew by then: what is
	 * in the map is the successor, and stays.
	 */
	if (value->socket == socket && !tracked.delete(key))
		count->removed++;
}

int on_state_change(struct tracepoint__sock__inet_sock_set_state *args)
{
	struct connection_key key = {};
	struct tracker_events *count;
	__u32 socket = (__u64)args->skaddr;
	int first = 0;

	/* An MPTCP connection tells of itself with another protocol number. */
	if (args->protocol != IPPROTO_TCP)
		return 0;
	if (args->newstate != TCP_ESTABLISHED && args->oldstate != TCP_ESTABLISHED)
		return 0;
#ifdef LOSE_ONE_IN
	/* For tests: as when the kernel does not run this program. */
	if (bpf_get_prandom_u32() % LOSE_ONE_IN == 0)
		return 0;
#endif

	key.netns = netns_of(args->skaddr);
	if (NETNS && key.netns != NETNS)
		return 0;
	/* saddr_v6 is filled for IPv4 too, as ::ffff:a.b.c.d; saddr has 4 bytes. */
	__builtin_memcpy(key.local_address, WORDS(args->saddr_v6), 16);
	__builtin_memcpy(key.remote_address, WORDS(args->daddr_v6), 16);
	key.local_port = args->sport;
	key.remote_port = args->dport;

	count = events.lookup(&first);
	if (!count)
		return 0;
	if (args->newstate == TCP_ESTABLISHED)
		opened(&key, socket, args->oldstate, count);
	else
		closed(&key, socket, count);
	return 0;
}
