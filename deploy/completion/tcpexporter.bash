# SPDX-License-Identifier: GPL-3.0-only
# Written by `make documents`.

_tcpexporter() {
	local word=${COMP_WORDS[COMP_CWORD]} flag=${COMP_WORDS[COMP_CWORD - 1]}
	# bash splits --flag=value into three words.
	if [[ $word == = ]]; then
		word= flag+==
	elif [[ $flag == = ]]; then
		flag=${COMP_WORDS[COMP_CWORD - 2]}=
	fi
	local words=
	case $flag in
	--simple=) words="true false" ;;
	--tcpv6=) words="true false" ;;
	--port | --port=) : ;;
	--duration | --duration=) : ;;
	--direction | --direction=) words="inbound outbound all" ;;
	--netns | --netns=) : ;;
	--expect | --expect=) : ;;
	--source | --source=) words="auto ebpf sock_diag procfs" ;;
	--interval | --interval=) : ;;
	--max-connections | --max-connections=) : ;;
	--reconcile-interval | --reconcile-interval=) : ;;
	--reconcile-cpu | --reconcile-cpu=) : ;;
	--listen | --listen=) : ;;
	--web-config | --web-config=) compopt -o default ;;
	--labels | --labels=) : ;;
	--clients=) words="true false" ;;
	--client-prefix | --client-prefix=) : ;;
	--histograms=) words="true false" ;;
	--buckets | --buckets=) : ;;
	--max-series | --max-series=) : ;;
	--once=) words="true false" ;;
	--output | --output=) compopt -o default ;;
	--features=) words="true false" ;;
	--check=) words="true false" ;;
	--log-level | --log-level=) words="debug info warning error" ;;
	--log-format | --log-format=) words="text json" ;;
	--pin | --pin=) compopt -o dirnames ;;
	--unpin=) words="true false" ;;
	--state | --state=) compopt -o default ;;
	--user | --user=) words=$(compgen -u) ;;
	--conf | --conf= | --config | --config=) compopt -o default ;;
	*) words="--simple --tcpv6 --port --duration --direction --netns --expect --source --interval --max-connections --reconcile-interval --reconcile-cpu --listen --web-config --labels --clients --client-prefix --histograms --buckets --max-series --once --output --features --check --log-level --log-format --pin --unpin --state --user --conf --config --help --version" ;;
	esac
	mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")
}
complete -F _tcpexporter tcpexporter
