#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-only
#
# Installs Debian packages, and copies them and their dependencies to /rootfs, without files
# that the exporter does not read. The Containerfile runs this in a stage of its own:
#
#   rootfs.sh PACKAGE...
set -eu

root=/rootfs

# Dependencies that install or configure packages, or that serve modules of Python that the
# exporter does not import: curses, dbm, nis, readline and sqlite3.
left_out='adduser|debconf.*|dpkg|libacl1|libcom-err2|libdb5.3|libgssapi-krb5-2|libk5crypto3'
left_out="$left_out|libkeyutils1|libkrb5.*|libncursesw6|libnsl2|libpcre2-8-0|libreadline8"
left_out="$left_out|libselinux1|libsqlite3-0|libtirpc.*|login|mailcap|media-types|passwd"
left_out="$left_out|perl.*|readline-common|sensible-utils|tar|tzdata"

export DEBIAN_FRONTEND=noninteractive
apt-get update -q
apt-get install -qy --no-install-recommends "$@"

# The package that has the files of a virtual one is installed too: dpkg knows its name.
apt-cache depends --recurse --installed --no-recommends --no-suggests --no-conflicts \
	--no-breaks --no-replaces --no-enhances base-files netbase "$@" |
	sed -n 's/^\([a-z0-9][^ :]*\).*/\1/p' | sort -u | grep -vxE "$left_out" >/tmp/packages

mkdir -p "$root/usr/bin" "$root/usr/lib" "$root/usr/lib64" "$root/usr/sbin"
for each in bin lib lib64 sbin; do
	ln -s "usr/$each" "$root/$each"
done

: >/tmp/files
mkdir -p "$root/var/lib/dpkg"
while read -r package; do
	dpkg-query -s "$package" >/dev/null 2>&1 || continue
	dpkg-query -L "$package" >>/tmp/files
	# Scanners for vulnerabilities read the names and versions of packages here.
	{
		dpkg-query -s "$package"
		echo
	} >>"$root/var/lib/dpkg/status"
done </tmp/packages

# Directories of base-files, documents, locales, static libraries, caches of Python, and
# modules and libraries that the exporter does not import. Copyright notices are kept.
grep -vE \
	-e '^/(boot|dev|home|media|mnt|opt|proc|srv|sys)(/|$)' \
	-e '^/usr/(bin|games|sbin|share|src)(/|$)' \
	-e '^/etc/(default|dpkg|gss|issue|netconfig|profile.d|skel|update-motd.d)' \
	-e '/(gconv|__pycache__)(/|$)' -e '\.(a|pyc)$' \
	-e '/lib(formw|icuio|icutest|icutu|menuw|ncursesw|panelw)\.so' \
	-e '/usr/lib/python3[.0-9]*/(config-3.*|curses|dbm|distutils|idlelib|lib2to3)(/|$)' \
	-e '/usr/lib/python3[.0-9]*/(pydoc_data|sqlite3)(/|$)' \
	-e '/usr/lib/python3[.0-9]*/lib-dynload/(_curses.*|_dbm|_sqlite3|nis|readline)' \
	/tmp/files >/tmp/kept
grep -E '^/usr/share/doc(/[^/]+(/copyright)?)?$' /tmp/files >>/tmp/kept
grep -xE '/usr/bin/python3[.0-9]*' /tmp/files >>/tmp/kept
sed 's|^/||' /tmp/kept | tar -C / --no-recursion --files-from=- -cf - |
	tar -C "$root" --keep-directory-symlink -xf -

# The scripts of packages have made these files.
cp /etc/passwd /etc/group "$root/etc/"
mkdir "$root/dev" "$root/proc" "$root/sys"
