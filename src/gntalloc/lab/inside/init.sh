#!/bin/busybox sh
# First program of every domain, in its initramfs: load the drivers, find the root disk, go there.
# The disk is shared by all domains and never written to; what they write stays in their own memory.

/bin/busybox mkdir -p /proc /sys /dev /disk /memory /root
/bin/busybox mount -t proc proc /proc
/bin/busybox --install -s /bin
export PATH=/bin

mount -t sysfs sys /sys
mount -t devtmpfs dev /dev

while read -r module; do
    insmod "/modules/$module" || echo "lab: no module $module"
done < /modules/order

# vda: the disk QEMU gives dom0. xvda: the same disk, as dom0 gives it to a guest.
for tenth in $(seq 100); do
    for name in vda xvda; do
        [ -b /dev/$name ] && disk=/dev/$name
    done
    [ -n "$disk" ] && break
    sleep 0.1
done

mount -t ext4 -o ro,noload "$disk" /disk
mount -t tmpfs -o size=75% tmpfs /memory
mkdir /memory/upper /memory/work
mount -t overlay -o lowerdir=/disk,upperdir=/memory/upper,workdir=/memory/work overlay /root

cp -a /lab /root/
for place in proc sys dev; do
    mount --move /$place /root/$place
done
exec switch_root /root /lab/start
