# SPDX-License-Identifier: GPL-3.0-only
"""Makes the files with which shells complete the flags of tcpexporter and their values.

A value is completed if it is one of a few words, a path or the name of a user.
"""

import re
import shlex
from collections.abc import Iterator

from tcpexporter.config.settings import SETTINGS
from tcpexporter.config.sources import Setting
from tcpexporter.config.values import CONF, DIRECTORY, OUTPUT, PATH, SWITCH, USER

WRITTEN = "# SPDX-License-Identifier: GPL-3.0-only\n# Written by `make documents`.\n"

OTHERS = {
    "--help": "print a summary of the settings and exit",
    "--version": "print the version and exit",
}
"""Flags that are not settings."""

# --- bash ---

BASH = """
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
@CASES@
	*) words="@FLAGS@" ;;
	esac
	mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")
}
complete -F _tcpexporter tcpexporter
"""


def bash() -> str:
    """Return the file for bash-completion."""
    flags = [flag for each in SETTINGS for flag in each.flags]
    return WRITTEN + BASH.replace("@CASES@", "\n".join(_bash_cases())).replace(
        "@FLAGS@", " ".join([*flags, *OTHERS])
    )


def _bash_cases() -> Iterator[str]:
    for each in SETTINGS:
        # The value of a switch can follow only after "=".
        ends = ("=",) if each.kind is SWITCH else ("", "=")
        patterns = " | ".join(flag + end for flag in each.flags for end in ends)
        yield f"\t{patterns}) {_bash_action(each)} ;;"


def _bash_action(setting: Setting) -> str:
    """Return the commands that complete the value of a setting."""
    match setting.kind:
        case kind if kind in (PATH, OUTPUT, CONF):
            return "compopt -o default"
        case kind if kind is DIRECTORY:
            return "compopt -o dirnames"
        case kind if kind is USER:
            return "words=$(compgen -u)"
        case kind if kind.words:
            return f'words="{" ".join(kind.words)}"'
    return ":"


# --- zsh ---


def zsh() -> str:
    """Return the function for zsh's completion system."""
    lines = " \\\n\t".join(_zsh_arguments())
    return f"#compdef tcpexporter\n{WRITTEN}\n_arguments \\\n\t{lines}\n"


def _zsh_arguments() -> Iterator[str]:
    for each in SETTINGS:
        star = "*" if each.is_repeatable else ""
        # "=-": the value can follow only after "=". "=": it can also be the next word.
        sign, colons = ("=-", "::") if each.kind is SWITCH else ("=", ":")
        metavar = each.kind.metavar.replace(":", r"\:")
        if each.kind is SWITCH:
            metavar = metavar.strip("[=]")
        for flag in each.flags:
            text = re.sub(r"([\[\]:\\])", r"\\\1", each.help)
            yield shlex.quote(
                f"{star}{flag}{sign}[{text}]{colons}{metavar}:{_zsh_action(each)}"
            )
    for flag, text in OTHERS.items():
        yield shlex.quote(f"{flag}[{text}]")


def _zsh_action(setting: Setting) -> str:
    match setting.kind:
        case kind if kind in (PATH, OUTPUT, CONF):
            return "_files"
        case kind if kind is DIRECTORY:
            return "_directories"
        case kind if kind is USER:
            return "_users"
        case kind if kind.words:
            return f"({' '.join(kind.words)})"
    return ""


# --- fish ---


def fish() -> str:
    """Return the completions for fish."""
    return WRITTEN + "complete -c tcpexporter -f\n" + "".join(_fish_lines())


def _fish_lines() -> Iterator[str]:
    for each in SETTINGS:
        for flag in each.flags:
            yield (
                f"complete -c tcpexporter -l {flag.removeprefix('--')}{_fish_value(each)}"
                f" -d {shlex.quote(each.help)}\n"
            )
    for flag, text in OTHERS.items():
        yield f"complete -c tcpexporter -l {flag.removeprefix('--')} -d '{text}'\n"


def _fish_value(setting: Setting) -> str:
    match setting.kind:
        case kind if kind is SWITCH:
            return ""
        case kind if kind in (PATH, OUTPUT, CONF):
            return " -r -F"
        case kind if kind is DIRECTORY:
            return " -x -a '(__fish_complete_directories)'"
        case kind if kind is USER:
            return " -x -a '(__fish_complete_users)'"
        case kind if kind.words:
            return f" -x -a '{' '.join(kind.words)}'"
    return " -x"
