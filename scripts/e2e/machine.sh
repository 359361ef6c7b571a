#!/bin/bash
# Run in fresh namespaces (mount, process, cgroup, network, host name, IPC) by machine.py: makes a small root of this machine's own /usr, and becomes
# its systemd. Nothing of this machine's can be written from there but what is bound below /opt. Usage: machine.sh ROOT NAME [FOLDER AS]...
set -e
root=$1 name=$2
shift 2
mount --make-rprivate /
mount -t tmpfs -o mode=755,size=2g machine "$root"
cd "$root"
mkdir -p usr etc/systemd/system var/lib var/log var/tmp run tmp root home proc sys dev opt old
chmod 1777 tmp var/tmp
chmod 700 root
ln -s ../run var/run
mount --bind /usr usr
mount -o remount,bind,ro usr
mount -t tmpfs -o mode=755 local usr/local
mkdir -p usr/local/bin
for link in bin sbin lib lib32 lib64 libx32; do if [ -L "/$link" ]; then ln -s "usr/$link" "$link"; fi; done
for file in passwd group shadow gshadow nsswitch.conf ld.so.cache ld.so.conf ld.so.conf.d pam.d pam.conf security login.defs dbus-1 alternatives host.conf shells services protocols sudoers sudoers.d; do
  if [ -e "/etc/$file" ]; then cp -a "/etc/$file" etc/; fi
done
: >etc/machine-id
echo "$name" >etc/hostname
echo "127.0.0.1 localhost $name" >etc/hosts
ln -s /lib/systemd/system/multi-user.target etc/systemd/system/default.target
# What is about hardware, and what belongs to a whole machine.
for unit in systemd-udevd.service systemd-udev-trigger.service systemd-resolved.service systemd-timesyncd.service systemd-logind.service getty.target \
  console-getty.service systemd-networkd.service systemd-sysctl.service systemd-modules-load.service systemd-remount-fs.service systemd-binfmt.service \
  systemd-firstboot.service systemd-sysusers.service dev-hugepages.mount dev-mqueue.mount sys-kernel-debug.mount sys-kernel-tracing.mount \
  sys-kernel-config.mount sys-fs-fuse-connections.mount proc-sys-fs-binfmt_misc.automount modprobe@.service; do
  ln -s /dev/null "etc/systemd/system/$unit"
done
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 dev dev
for node in null zero full random urandom tty; do
  : >"dev/$node"
  mount --bind "/dev/$node" "dev/$node"
done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts dev/pts
mount -t tmpfs -o mode=1777 shm dev/shm
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
ln -s fd/0 dev/stdin
ln -s fd/1 dev/stdout
ln -s fd/2 dev/stderr
: >dev/console
mount -t tmpfs -o mode=755 run run
while [ $# -gt 1 ]; do
  mkdir -p "opt/$2"
  mount --bind "$1" "opt/$2"
  mount -o remount,bind,ro "opt/$2"
  shift 2
done
hostname "$name"
pivot_root . old
exec chroot . /bin/sh -c 'umount -l /old && rmdir /old && exec env -i container=everlit PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd'
