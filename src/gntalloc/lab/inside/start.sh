#!/bin/sh
# Process 1 of every domain: what a distribution's init would have set up, then the agent.
# LAB_DOMAIN comes from the kernel's command line: words the kernel does not know become environment.

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/root LANG=C.UTF-8 TERM=linux PYTHONPATH=/lab/site

mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
mount -t xenfs xenfs /proc/xen
mkdir -p /run/lab /run/lock /run/xen /run/xenstored /var/lib/xen /var/lib/xenstored /var/log/xen/console
ip link set lo up

for folder in /usr/lib/xen-*/bin; do
    [ -d "$folder" ] && PATH=$PATH:$folder
done

hostname "$LAB_DOMAIN"
if [ "$LAB_DOMAIN" = dom0 ]; then
    xenstored --pid-file /run/xenstored.pid
    xen-init-dom0
    xenconsoled --pid-file=/run/xenconsoled.pid
fi

cd /lab/agent
python3 -m inside
echo "lab: the agent ended with $?"
echo o > /proc/sysrq-trigger
sleep 60
