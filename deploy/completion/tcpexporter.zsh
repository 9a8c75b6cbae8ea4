#compdef tcpexporter
# SPDX-License-Identifier: GPL-3.0-only
# Written by `make documents`.

_arguments \
	'--simple=-[export one number without labels instead of one per port and IP version]::BOOL:(true false)' \
	'--tcpv6=-[count IPv6 connections too]::BOOL:(true false)' \
	'--port=[count only connections to these local ports]:PORTS:' \
	'--duration=[minimum age of a long-term connection]:TIME:' \
	'--direction=[count connections opened to this host (inbound), from this host (outbound), or both]:WORD:(inbound outbound all)' \
	'--netns=[network namespace to count\: the exporter'"'"'s own, all, or one by its name]:NETNS:' \
	'*--expect=[count the connections that match this rule, because some must exist; can be given several times]:NAME=RULE:' \
	'--source=[where connections are read from; auto tries ebpf, sock_diag, procfs in this order]:WORD:(auto ebpf sock_diag procfs)' \
	'--interval=[time between two reads of the socket tables by sock_diag or procfs]:TIME:' \
	'--max-connections=[maximum number of TCP connections that can be tracked]:NUMBER:' \
	'--reconcile-interval=[time between two reconciliations\: comparisons with the socket tables]:TIME:' \
	'--reconcile-cpu=[maximum average CPU time of reconciliation, in percent of one core]:PERCENT:' \
	'--listen=[address and port at which /metrics is served]:[HOST\:]PORT:' \
	'--web-config=[file with TLS, passwords and limits, in the file format of the Prometheus exporters]:PATH:_files' \
	'--labels=[what is counted separately; auto is port,tcp_version, and netns with --netns all; none is the same as --simple]:LABELS:' \
	'--clients=-[count the distinct clients (remote addresses) of each series]::BOOL:(true false)' \
	'--client-prefix=[how many leading bits of an IPv4 and of an IPv6 address identify a client]:BITS,BITS:' \
	'--histograms=-[export histograms of the ages of open connections and of the lifetimes of closed ones]::BOOL:(true false)' \
	'--buckets=[upper bounds of the histograms; --duration is always one of them]:TIMES:' \
	'--max-series=[maximum number of series of a metric; if there are more, the smallest are added up as port other, except ports that --port selects]:NUMBER:' \
	'--once=-[print the metrics once, after watching for --duration, then exit]::BOOL:(true false)' \
	'--output=[with --once, write the metrics to this file, completely or not at all, for node_exporter'"'"'s textfile collector]:PATH:_files' \
	'--features=-[list the kernel features that tcpexporter uses and whether this kernel has them, then exit]::BOOL:(true false)' \
	'--check=-[check the settings and what they require on this host, print what would run, then exit; whether another exporter uses --pin or --state is not checked]::BOOL:(true false)' \
	'--log-level=[lowest severity that is logged]:WORD:(debug info warning error)' \
	'--log-format=[format of a log line]:WORD:(text json)' \
	'--pin=[pin the BPF maps in this bpffs directory, so that recording continues while the exporter is down and the next start adopts it]:DIR:_directories' \
	'--unpin=-[stop recording\: delete what is pinned in the directory of --pin, or else in /sys/fs/bpf/tcpexporter, then exit]::BOOL:(true false)' \
	'--state=[save connection ages to this file and restore them at start (used when nothing can be pinned)]:PATH:_files' \
	'--user=[unprivileged user to switch to after start-up]:USER:_users' \
	'--conf=[file to read settings from]:PATH:_files' \
	'--config=[file to read settings from]:PATH:_files' \
	'--help[print a summary of the settings and exit]' \
	'--version[print the version and exit]'
