// SPDX-License-Identifier: GPL-2.0-only
/*
 * Maintains an array of the TCP connections in state ESTABLISHED. The kernel runs the
 * program at the tracepoint sock:inet_sock_set_state. It is attached as
 * BPF_TRACE_RAW_TP with the kernel's types, so it reads the socket with plain loads
 * that the verifier checks. The loader defines these macros:
 *
 * MAX_CONNECTIONS  number of slots; a slot holds one connection
 * MAX_CLOSINGS     capacity of the closings log
 * MAX_SERIES       number of series numbers
 * MAP_FLAGS        flags of the hash maps: BPF_F_NO_PREALLOC, or 0
 * NETNS            inode of the only network namespace to observe, 0: all
 * BY_NETNS         whether network namespaces are counted separately
 * BY_CGROUP        undefined: cgroups are not counted separately
 * TAGGED_CGROUP    whether a socket has its cgroup as a number with flags
 * OWN_PORT         of the exporter's own listener in OWN_NETNS; 0: it has none
 * OUTBOUND_PORT    which port is part of the series of an outbound connection:
 *                  LOCAL_PORT, REMOTE_PORT, or 0: none, and failed attempts are not
 *                  counted
 * CLIENTS          undefined: clients are not distinguished; otherwise these masks say
 *                  which bits of an address identify a client, as two words of its 16
 *                  bytes: IPV4_MASK_0, _1, IPV6_MASK_0, _1
 * BUCKETS          number of lifetime buckets; undefined: none are counted
 * BOUNDS           the upper bounds of all buckets except the last, in units of 2^13 ns
 * SECRET_0, _1     the key of the hash
 * LOSE_ONE_IN      in tests: the program ignores one in so many events, at random
 * INTERRUPTIBLE    whether a run of the program can interrupt another one on its CPU
 * ORDER            how stores are ordered: ORDERED, BY_EXCHANGE or BY_STACK
 * *_OFFSET         offsets of members of the kernel's structs, in bytes, from BTF
 *
 * Terms: a *handle* identifies the connection of a slot. It is the address of the
 * socket. If the connection comes from the socket tables, it is a *seed*, and its
 * handle is the hash of its key (addresses, ports, network namespace).
 *
 * The owner of a slot, which alone may write to its connection
 * ------------------------------------------------------------
 * A slot is in one of three states. A free slot is in a range on the stack
 * `free_slots`. If a run of the program or a thread of userspace has popped the range,
 * the run or the thread owns the slot. Otherwise the slot is the value of one entry of
 * `slots`: then the run for the socket with that handle owns it. For a seed, that is
 * the run for a closing socket whose key has that hash. The kernel reports the states
 * of a socket one after another, so two runs never write to the same connection.
 *
 * The program allocates slots, and never frees a slot that was used. A closed
 * connection keeps its slot for the next socket at the same address: the kernel's
 * allocator is likely to reuse that address soon. Userspace deletes entries of `slots`
 * and frees their slots: see Tracker.release in tcpexporter/ebpf/tracker.py, which
 * explains the races.
 */
#include "tcp_tracker.h"

#define AF_INET 2
#define IPPROTO_TCP 6
#define TCP_ESTABLISHED 1
#define TCP_SYN_SENT 2
#define TCP_CLOSE 7
#define TCP_LISTEN 10

#define RECENT_SLOTS_BITS 16
#define RECENT_NUMBERS_BITS 8
#define MULTIPLIER 0x9e3779b97f4a7c15 /* 2^64 / golden ratio, odd */
#define NO_SLOT 0xffffffff

#define LOCAL_PORT 1
#define REMOTE_PORT 2

/* The slot of each handle. */
BPF_F_TABLE("hash", __u64, __u32, slots, MAX_CONNECTIONS, MAP_FLAGS);

BPF_F_TABLE("array", __u32, struct connection, connections, MAX_CONNECTIONS,
	    BPF_F_MMAPABLE);

BPF_F_TABLE("array", __u32, __u64, series_and_time, MAX_CONNECTIONS, BPF_F_MMAPABLE);

#ifdef CLIENTS
/* The hash of the client of each slot's connection. */
BPF_F_TABLE("array", __u32, __u64, clients, MAX_CONNECTIONS, BPF_F_MMAPABLE);
#else
BPF_ARRAY(clients, __u64, 1);
#endif

BPF_STACK(free_slots, __u32, MAX_CONNECTIONS);

/* The number of each series. */
BPF_F_TABLE("hash", struct series_key, __u32, series_numbers, MAX_SERIES, MAP_FLAGS);

BPF_F_TABLE("array", __u32, struct ledger_entry, ledger, SERIES_FIRST + MAX_SERIES,
	    BPF_F_MMAPABLE);

/* Written by userspace: corrects the ledger after missed events. See ledger_entry. */
BPF_F_TABLE("array", __u32, struct ledger_entry, corrections, SERIES_FIRST + MAX_SERIES,
	    BPF_F_MMAPABLE);

BPF_STACK(free_series, __u32, MAX_SERIES);

/*
 * Caches of `slots` and `series_numbers`, because lookups in hash maps take most of the
 * time of a run. All keys with the same hash share one element. Its low half is the
 * slot or number that a run found for one of these keys; the record or the ledger shows
 * for which. Its high half is the epoch that this run had loaded. Elements of other
 * epochs are invalid. In epoch 2^32 the caches are off: no element has it, because it
 * has 33 bits. What a run stores then has epoch 0, which never comes again. Userspace
 * turns the caches off before it deletes keys: see Runs.without_caches in
 * tcpexporter/ebpf/runs.py.
 */
BPF_ARRAY(recent_slots, __u64, 1 << RECENT_SLOTS_BITS);
BPF_ARRAY(recent_numbers, __u64, 1 << RECENT_NUMBERS_BITS);
BPF_F_TABLE("array", __u32, __u64, epochs, 1, BPF_F_MMAPABLE);

/* Whether closings are recorded: userspace is comparing with the socket tables. */
BPF_ARRAY(recording, __u32, 1);

/* The closings log: for each closed connection, the handle of a seed with its key. */
BPF_F_TABLE("hash", __u64, __u32, closings, MAX_CLOSINGS, MAP_FLAGS);

BPF_PERCPU_ARRAY(events, struct tracker_events, 1);

#define ORDERED 0
#define BY_EXCHANGE 1
#define BY_STACK 2

#if ORDER == BY_STACK
/* Always empty: order_stores uses its lock. */
BPF_STACK(empty_stack, __u32, 1);
#endif

/* Userspace updates this map to wait until all runs that have begun have ended. */
BPF_ARRAY_OF_MAPS(barrier, "events", 1);

/*
 * Hide the origin of a pointer from BCC. If BCC can trace a pointer back to the
 * context, it replaces each load through the pointer by a helper call.
 */
static const void *untraced(__u64 address)
{
	const void *pointer;

	asm volatile("%0 = %1" : "=r"(pointer) : "r"(address));
	return pointer;
}

#define LOAD(type, base, offset) (*(const volatile type *)((base) + (offset)))
#define STORE(type, member, value) (*(volatile type *)&(member) = (value))

/*
 * Make all earlier stores of this run visible to other CPUs before all later ones.
 * x86-64 does that with any stores (ORDERED). Other machines: an exchange is an atomic
 * operation with acquire and release (swpal), or it ends with a barrier (ldxr, stlxr,
 * dmb ish), even on memory that only this run uses. A pop acquires and releases a
 * lock. One pop orders nothing: earlier and later stores may both move into its
 * critical section. The release of the first pop and the acquisition of the second one
 * do. See tcpexporter/connections/memory_order.py.
 */
static void order_stores(void)
{
#if ORDER == BY_EXCHANGE
	volatile __u64 own = 0;

	__sync_lock_test_and_set(&own, 1);
#elif ORDER == BY_STACK
	__u32 popped;

	empty_stack.pop(&popped);
	empty_stack.pop(&popped);
#endif
}

static __u32 netns_of(const void *sk)
{
	const void *net = untraced(LOAD(__u64, sk, SKC_NET_OFFSET));

	return LOAD(__u32, net, NETNS_INUM_OFFSET);
}

static void load_address(__u8 *address, const void *sk, int family, int ipv4_offset,
			 int ipv6_offset)
{
	__u32 *words = (__u32 *)address;

	if (family == AF_INET) {
		words[0] = 0;
		words[1] = 0;
		words[2] = bpf_htonl(0xffff);
		words[3] = LOAD(__u32, sk, ipv4_offset);
		return;
	}
	words[0] = LOAD(__u32, sk, ipv6_offset);
	words[1] = LOAD(__u32, sk, ipv6_offset + 4);
	words[2] = LOAD(__u32, sk, ipv6_offset + 8);
	words[3] = LOAD(__u32, sk, ipv6_offset + 12);
}

static void load_key(struct connection_key *key, const void *sk, __u32 netns,
		     __u16 local_port)
{
	int family = LOAD(__u16, sk, SKC_FAMILY_OFFSET);

	load_address(key->local_address, sk, family, SKC_RCV_SADDR_OFFSET,
		     SKC_V6_RCV_SADDR_OFFSET);
	load_address(key->remote_address, sk, family, SKC_DADDR_OFFSET,
		     SKC_V6_DADDR_OFFSET);
	key->netns = netns;
	key->local_port = local_port;
	key->remote_port = bpf_ntohs(LOAD(__u16, sk, SKC_DPORT_OFFSET));
}

/*
 * Return the local port. Only an unbound socket requires the helper: a reset unbinds
 * it, but it keeps inet_sport.
 */
static __u16 port_of_closed(const void *sk)
{
	__u16 bound = LOAD(__u16, sk, SKC_NUM_OFFSET);
	const void *inet;

	if (bound)
		return bound;
	inet = untraced((__u64)bpf_skc_to_tcp_sock((void *)sk));
	return inet ? bpf_ntohs(LOAD(__u16, inet, INET_SPORT_OFFSET)) : 0;
}

#ifdef BY_CGROUP

#define ROOT_CGROUP 1

#if TAGGED_CGROUP
static long (*probe_read_kernel)(void *into, __u32 size, __u64 from) = (void *)113;

static __u64 read_kernel(__u64 address)
{
	__u64 found = 0;

	probe_read_kernel(&found, sizeof(found), address);
	return found;
}
#endif

/*
 * Return the number of the cgroup in which the socket was made; a socket that
 * accept(2) returns has that of the listener.
 *
 * Before Linux kernel commit 8520e224f547 ("bpf, cgroups: Fix cgroup v2 fallback on
 * v1/v2 mixed mode") (in v5.15) the pointer was a number, of which the lowest two bits
 * are flags. The verifier does not know the type of a number, so the program must call
 * a helper. If a flag is set, or there is no pointer, the cgroup is the root:
 * sock_cgroup_ptr in the kernel's include/linux/cgroup.h.
 */
static __u64 cgroup_of(const void *sk)
{
#if TAGGED_CGROUP
	__u64 cgroup = LOAD(__u64, sk, SK_CGROUP_OFFSET);

	if (!cgroup || cgroup & 3)
		return ROOT_CGROUP;
	return read_kernel(read_kernel(cgroup + CGROUP_KN_OFFSET) +
			   KERNFS_NODE_ID_OFFSET);
#else
	const void *cgroup = untraced(LOAD(__u64, sk, SK_CGROUP_OFFSET));
	const void *node = untraced(LOAD(__u64, cgroup, CGROUP_KN_OFFSET));

	return cgroup ? LOAD(__u64, node, KERNFS_NODE_ID_OFFSET) : ROOT_CGROUP;
#endif
}

#else

static __u64 cgroup_of(const void *sk)
{
	return 0;
}

#endif

#define ROTATED(x, bits) ((x) << (bits) | (x) >> (64 - (bits)))

#define SIPROUND                                                                       \
	do {                                                                           \
		v0 += v1;                                                              \
		v1 = ROTATED(v1, 13);                                                  \
		v1 ^= v0;                                                              \
		v0 = ROTATED(v0, 32);                                                  \
		v2 += v3;                                                              \
		v3 = ROTATED(v3, 16);                                                  \
		v3 ^= v2;                                                              \
		v0 += v3;                                                              \
		v3 = ROTATED(v3, 21);                                                  \
		v3 ^= v0;                                                              \
		v2 += v1;                                                              \
		v1 = ROTATED(v1, 17);                                                  \
		v1 ^= v2;                                                              \
		v2 = ROTATED(v2, 32);                                                  \
	} while (0)

/* Return SipHash-1-3 of some words, as in tcpexporter/connections/identity.py. */
static __u64 siphash(const __u64 *words, int count)
{
	__u64 v0 = 0x736f6d6570736575 ^ SECRET_0;
	__u64 v1 = 0x646f72616e646f6d ^ SECRET_1;
	__u64 v2 = 0x6c7967656e657261 ^ SECRET_0;
	__u64 v3 = 0x7465646279746573 ^ SECRET_1;
	__u64 length = (__u64)(count * sizeof(*words)) << 56;

#pragma unroll
	for (int i = 0; i < count; i++) {
		v3 ^= words[i];
		SIPROUND;
		v0 ^= words[i];
	}
	v3 ^= length;
	SIPROUND;
	v0 ^= length;
	v2 ^= 0xff;
	SIPROUND;
	SIPROUND;
	SIPROUND;
	return v0 ^ v1 ^ v2 ^ v3;
}

static __u64 handle_of_seed(const struct connection_key *key)
{
	return siphash((const __u64 *)key, 5) | HANDLE_SEEDED;
}

static __u64 current_epoch(void)
{
	__u32 first = 0;
	__u64 *epoch = epochs.lookup(&first);

	return epoch ? LOAD(__u64, epoch, 0) : 0;
}

/*
 * Return a handle as a number. With CAP_PERFMON, the verifier allows a change of a
 * pointer's byte order, and treats the result as a number; it refuses all other
 * arithmetic. On a little-endian machine this instruction does nothing.
 */
static __u64 number_from(__u64 handle)
{
	asm("%0 = le64 %0" : "+r"(handle));
	return handle;
}

/* Return the index of the element of a cache for a key. */
static int element_for(__u64 key, int bits)
{
	key *= MULTIPLIER;
	key ^= key >> 32;
	return key * MULTIPLIER >> (64 - bits);
}

/* Return the slot or number in an element of a cache, or `none` if it is invalid. */
static __u32 cached(const __u64 *element, __u64 epoch, __u32 none)
{
	__u64 found = LOAD(__u64, element, 0);

	return found >> 32 == epoch ? found : none;
}

static void cache(__u64 *element, __u64 epoch, __u32 found)
{
	STORE(__u64, *element, epoch << 32 | found);
}

static __u64 *recent_slot(__u64 handle)
{
	int at = element_for(number_from(handle), RECENT_SLOTS_BITS);

	return recent_slots.lookup(&at);
}

/* Return the connection of a slot if it has this handle, or NULL. */
static struct connection *in_slot(__u32 slot, __u64 handle)
{
	struct connection *connection = connections.lookup(&slot);

	return connection && connection->handle == handle ? connection : NULL;
}

/*
 * Return the connection with this handle and its slot's number, or NULL.
 * When userspace deletes an entry of a hash map, the kernel can reuse the memory of the
 * entry for another handle, while this run has a pointer to the value. So the value may
 * be the slot of another handle. Therefore the handle in the record of the slot is
 * compared: userspace clears it before it frees the slot. The value is loaded once,
 * because it can change between two loads.
 */
static struct connection *find_in_map(__u64 handle, __u32 *number)
{
	__u32 *slot = slots.lookup(&handle);

	if (!slot)
		return NULL;
	*number = LOAD(__u32, slot, 0);
	return in_slot(*number, handle);
}

/* Return what `find_in_map` does, but search the cache first. */
static struct connection *find(__u64 handle, __u64 epoch, __u32 *number)
{
	__u64 *recent = recent_slot(handle);
	struct connection *connection;

	if (!recent)
		return NULL;
	*number = cached(recent, epoch, NO_SLOT);
	connection = in_slot(*number, handle);
	if (connection)
		return connection;
	connection = find_in_map(handle, number);
	if (connection)
		cache(recent, epoch, *number);
	return connection;
}

static void push_free(__u32 range)
{
	/* Since Linux 6.15 a push fails after 250 ms without its lock: try twice. */
	if (free_slots.push(&range, 0))
		free_slots.push(&range, 0);
}

/* Allocate a slot for a handle without a slot; return NULL if no slot is free. */
static struct connection *allocate(__u64 handle, __u32 *number)
{
	struct connection *connection;
	__u32 range, slot;

	if (free_slots.pop(&range))
		return NULL;
	slot = range >> RANGE_BITS;
	if (range & RANGE_MASK)
		push_free(range + (1 << RANGE_BITS) - 1);
	if (slots.update(&handle, &slot)) {
		push_free(slot << RANGE_BITS);
		return NULL;
	}
	*number = slot;
	connection = connections.lookup(&slot);
	if (connection)
		connection->handle = handle;
	return connection;
}

static bool is_ipv4(const struct connection_key *key)
{
	const __u32 *words = (const __u32 *)key->remote_address;

	return !words[0] && !words[1] && words[2] == bpf_htonl(0xffff);
}

static void record_client(__u32 slot, const struct connection_key *key)
{
#ifdef CLIENTS
	const __u64 *address = (const __u64 *)key->remote_address;
	__u64 client[] = {
	    address[0] & (is_ipv4(key) ? IPV4_MASK_0 : IPV6_MASK_0),
	    address[1] & (is_ipv4(key) ? IPV4_MASK_1 : IPV6_MASK_1),
	};
	__u64 *recorded = clients.lookup(&slot);

	if (recorded)
		STORE(__u64, *recorded, siphash(client, 2) & 0xffffffff);
#endif
}

static struct series_key series_of(const struct connection_key *key, __u64 cgroup,
				   bool is_outbound, __u16 outbound_port)
{
	struct series_key series = {
	    .cgroup = bpf_htonll(cgroup),
	    .netns = BY_NETNS ? bpf_htonl(key->netns) : 0,
	    .port = bpf_htons(is_outbound ? outbound_port : key->local_port),
	    .ip_version = is_ipv4(key) ? 4 : 6,
	};

	if (is_outbound)
		series.flags = SERIES_OUTBOUND |
			       (OUTBOUND_PORT == REMOTE_PORT ? SERIES_REMOTE_PORT : 0);
	else if (OWN_PORT && key->local_port == OWN_PORT && key->netns == OWN_NETNS)
		series.flags = SERIES_OWN;
	return series;
}

static __u16 outbound_port_of(const struct connection_key *key)
{
	if (OUTBOUND_PORT == REMOTE_PORT)
		return key->remote_port;
	return OUTBOUND_PORT == LOCAL_PORT ? key->local_port : 0;
}

static bool is_series(const struct series_key *one, const struct series_key *other)
{
	const __u64 *words = (const __u64 *)one;
	const __u64 *others = (const __u64 *)other;

	return words[0] == others[0] && words[1] == others[1];
}

static void store_series(struct ledger_entry *entry, const struct series_key *series)
{
	const __u64 *words = (const __u64 *)series;
	volatile __u64 *stored = (volatile __u64 *)&entry->series;

	stored[0] = words[0];
	stored[1] = words[1];
}

static bool is_number_of(__u32 number, const struct series_key *series)
{
	struct ledger_entry *entry = ledger.lookup(&number);

	return entry && is_series(&entry->series, series);
}

/*
 * Return the number of a series, or 0 if it has none. As in `find_in_map`, the value
 * can be that of another series whose entry uses the memory of a deleted one.
 */
static __u32 number_of(struct series_key *series)
{
	__u32 *found = series_numbers.lookup(series);
	__u32 number = found ? *found : 0;

	return is_number_of(number, series) ? number : 0;
}

static void push_free_series(__u32 range)
{
	/* Try twice, as in push_free. */
	if (free_series.push(&range, 0))
		free_series.push(&range, 0);
}

/* Allocate a number for a series that has none. Return 0 if none is free. */
static __u32 allocate_number(struct series_key *series)
{
	struct ledger_entry *entry;
	struct series_key none = {};
	__u32 range, number;

	if (free_series.pop(&range))
		return 0;
	number = range >> RANGE_BITS;
	if (range & RANGE_MASK)
		push_free_series(range + (1 << RANGE_BITS) - 1);
	entry = ledger.lookup(&number);
	if (!entry)
		return 0;
	/* Store the series before another run can find the number. */
	store_series(entry, series);
	if (!series_numbers.insert(series, &number))
		return number;
	/* Another CPU was faster, or the kernel has no memory. */
	store_series(entry, &none);
	push_free_series(number << RANGE_BITS);
	return number_of(series);
}

/* Return the number in which a series is counted, never 0. */
static __u32 counted_in(struct series_key *series, __u64 epoch)
{
	const __u64 *words = (const __u64 *)series;
	__u32 folded =
	    1 + (series->ip_version == 6) + 2 * (series->flags & SERIES_OUTBOUND);
	int at = element_for(words[0] * MULTIPLIER ^ words[1], RECENT_NUMBERS_BITS);
	__u64 *recent = recent_numbers.lookup(&at);
	__u32 number;

	if (!recent)
		return folded;
	number = cached(recent, epoch, 0);
	if (is_number_of(number, series))
		return number;
	number = number_of(series);
	if (!number)
		number = allocate_number(series);
	if (!number)
		return folded;
	cache(recent, epoch, number);
	return number;
}

#define ADD(member, number) __sync_fetch_and_add(&(member), number)

/* Count an event of this CPU. Only an interrupt by another run could lose it. */
#if INTERRUPTIBLE
#define COUNT(member) ADD(member, 1)
#else
#define COUNT(member) ((member)++)
#endif

static void record_opened(__u32 number)
{
	struct ledger_entry *entry = ledger.lookup(&number);

	if (entry)
		ADD(entry->opened, 1);
}

static void record_closed(__u64 word)
{
	__u32 number = word & SERIES_MASK;
	struct ledger_entry *entry = ledger.lookup(&number);

	if (!entry)
		return;
	ADD(entry->closed, 1);
#ifdef BUCKETS
	static const __u64 bounds[] = {BOUNDS};
	__u64 lifetime =
	    (bpf_ktime_get_boot_ns() >> TIME_SHIFT) - (word >> SERIES_BITS);
	__u32 bucket = 0;

#pragma unroll
	for (int i = 0; i < BUCKETS - 1; i++)
		bucket += lifetime > bounds[i];
	ADD(entry->lifetimes_sum, lifetime);
	if (bucket < BUCKETS)
		ADD(entry->lifetimes[bucket], 1);
#endif
}

static bool is_open(__u64 word)
{
	return word & SERIES_MASK;
}

static void remove_from(__u64 *word, struct tracker_events *count)
{
	__u64 removed = *word;

	STORE(__u64, *word, CLOSED);
	record_closed(removed);
	COUNT(count->removed);
}

static void opened(const void *sk, __u32 netns, int oldstate,
		   struct tracker_events *count)
{
	__u64 handle = (__u64)sk;
	__u64 *word;
	__u32 slot = 0;
	__u64 epoch = current_epoch();
	struct connection *connection = find(handle, epoch, &slot);
	struct series_key series;
	__u64 cgroup;
	__u32 number;

	if (!connection) {
		connection = allocate(handle, &slot);
		if (!connection) {
			COUNT(count->refused);
			return;
		}
		COUNT(count->allocated);
	}
	word = series_and_time.lookup(&slot);
	if (!word)
		return;
	/* The closing of the last connection at this address was missed. */
	if (is_open(*word)) {
		remove_from(word, count);
		order_stores();
	}
	load_key(&connection->key, sk, netns, LOAD(__u16, sk, SKC_NUM_OFFSET));
	connection->is_outbound = oldstate == TCP_SYN_SENT;
	cgroup = cgroup_of(sk);
	connection->cgroup = cgroup;
	record_client(slot, &connection->key);
	series = series_of(&connection->key, cgroup, oldstate == TCP_SYN_SENT,
			   outbound_port_of(&connection->key));
	number = counted_in(&series, epoch);
	/* A reader that finds the word finds the record and the client, too. */
	order_stores();
	*(volatile __u64 *)word =
	    bpf_ktime_get_boot_ns() >> TIME_SHIFT << SERIES_BITS | number;
	record_opened(number);
	COUNT(count->inserted);
}

static bool is_same(const struct connection_key *one,
		    const struct connection_key *other)
{
	const __u64 *words = (const __u64 *)one;
	const __u64 *others = (const __u64 *)other;

	return words[0] == others[0] && words[1] == others[1] &&
	       words[2] == others[2] && words[3] == others[3] && words[4] == others[4];
}

static void closed(const void *sk, __u32 netns, struct tracker_events *count)
{
	__u32 slot = 0;
	struct connection *connection = find((__u64)sk, current_epoch(), &slot);
	__u64 *word = series_and_time.lookup(&slot);
	struct connection_key key;
	__u32 nothing = 0;
	int first = 0;
	__u32 *flag = recording.lookup(&first);
	bool is_recording = flag && *flag;
	bool has_record = connection && word && is_open(*word);
	bool is_known;
	__u64 handle;

	load_key(&key, sk, netns, port_of_closed(sk));
	/*
	 * A record with another key belongs to the previous connection at this address.
	 * Its closing was missed, and so was the opening of this connection. Then this
	 * connection may be a seed.
	 */
	is_known = has_record && is_same(&connection->key, &key);
	if (has_record)
		remove_from(word, count);
	if (is_known && !is_recording)
		return;
	handle = handle_of_seed(&key);
	/*
	 * Record the closing before the search for a seed. Userspace adds a seed before
	 * it reads the log, so either the search or userspace finds the seed.
	 */
	if (is_recording && closings.update(&handle, &nothing))
		COUNT(count->unrecorded);
	if (is_known)
		return;
	connection = find_in_map(handle, &slot);
	word = series_and_time.lookup(&slot);
	if (!connection || !word || !is_open(*word))
		return;
	remove_from(word, count);
	COUNT(count->removed_seeds);
}

/* Count an outbound attempt that has failed. Its local port is in no series. */
static void failed(const void *sk, __u32 netns)
{
	struct connection_key key;
	struct series_key series;
	struct ledger_entry *entry;
	__u32 number;

	load_key(&key, sk, netns, port_of_closed(sk));
	series = series_of(&key, cgroup_of(sk), 1,
			   OUTBOUND_PORT == REMOTE_PORT ? key.remote_port : 0);
	number = counted_in(&series, current_epoch());
	entry = ledger.lookup(&number);
	if (entry)
		ADD(entry->failed, 1);
}

int on_state_change(struct bpf_raw_tracepoint_args *args)
{
	const void *sk = untraced(args->args[0]);
	int oldstate = args->args[1];
	int newstate = args->args[2];
	struct tracker_events *count;
	int first = 0;
	bool has_failed;
	bool is_listener;
	__u32 netns;

	has_failed = OUTBOUND_PORT && oldstate == TCP_SYN_SENT && newstate == TCP_CLOSE;
	/*
	 * The kernel makes an accepted socket by copying the listener. The state of
	 * the copy changes from LISTEN to SYN_RECV, which is not counted.
	 */
	is_listener =
	    newstate == TCP_LISTEN || (oldstate == TCP_LISTEN && newstate == TCP_CLOSE);
	if (newstate != TCP_ESTABLISHED && oldstate != TCP_ESTABLISHED && !has_failed &&
	    !is_listener)
		return 0;
	/* MPTCP's own socket has another protocol number, and is not counted. */
	if (LOAD(__u16, sk, SK_PROTOCOL_OFFSET) != IPPROTO_TCP)
		return 0;
	netns = netns_of(sk);
	if (NETNS && netns != NETNS)
		return 0;
	count = events.lookup(&first);
	if (!count)
		return 0;
	if (is_listener) {
		COUNT(count->listener_changes);
		return 0;
	}
#ifdef LOSE_ONE_IN
	/* For tests: ignore and count the event, as if the kernel skipped it. */
	if (bpf_get_prandom_u32() % LOSE_ONE_IN == 0) {
		COUNT(count->unrecorded);
		return 0;
	}
#endif
	if (has_failed)
		failed(sk, netns);
	else if (newstate == TCP_ESTABLISHED)
		opened(sk, netns, oldstate, count);
	else
		closed(sk, netns, count);
	return 0;
}
