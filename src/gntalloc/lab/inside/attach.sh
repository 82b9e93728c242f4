#!/bin/sh
# Called by libxl when it attaches a disk to a guest: name the device to the block backend.
# Stands in for Xen's own script, which needs udev and checks for sharing that a read-only disk may do.

[ "$1" = add ] || exit 0
device=$(xenstore-read "$XENBUS_PATH/params")
xenstore-write "$XENBUS_PATH/physical-device" "$(stat -L -c %t:%T "$device")"
xenstore-write "$XENBUS_PATH/hotplug-status" connected
