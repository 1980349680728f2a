#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
#
# Runs rkvm-vmm with small flat guests and checks what they print and the status
# that the VMM ends with. TAP on stdout; exits 0 if all pass, 1 if one fails, 4 if
# there is no device to test with. Needs a POSIX shell with timeout(1), nothing else.
#
#	flat-guests.sh [--device PATH] [--vmm PATH]

device=/dev/rkvm
vmm=rkvm-vmm
while [ $# -gt 0 ]; do
	case $1 in
	--device) device=$2; shift 2 ;;
	--vmm) vmm=$2; shift 2 ;;
	*) echo "usage: $0 [--device PATH] [--vmm PATH]" >&2; exit 1 ;;
	esac
done

echo "TAP version 13"
if [ ! -e "$device" ]; then
	echo "1..0 # SKIP no $device"
	exit 4
fi

dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
number=0
failed=0

# hex BYTE...: writes the bytes, given in hexadecimal, to the guest's image.
hex() {
	for byte; do
		# shellcheck disable=SC2059
		printf "\\$(printf %o "0x$byte")"
	done >"$dir/guest"
}

# verdict NAME CONDITION-STATUS DETAIL
verdict() {
	number=$((number + 1))
	if [ "$2" = 0 ]; then
		echo "ok $number $1"
	else
		failed=1
		echo "not ok $number $1"
		echo "# $3"
		sed 's/^/# stderr: /' "$dir/err"
	fi
}

# skip NAME REASON
skip() {
	number=$((number + 1))
	echo "ok $number $1 # SKIP $2"
}

# vmm ARGUMENT...: runs the VMM; its status is in $status, its output in out and err.
vmm() {
	timeout 60 "$vmm" --device "$device" --irqchip none --memory 2 --timeout 20 "$@" \
		>"$dir/out" 2>"$dir/err" <"$dir/in"
	status=$?
}

# guest NAME STATUS OUTPUT ARGUMENT...: runs the image and compares.
guest() {
	name=$1 want=$2 output=$3
	shift 3
	vmm --flat "$dir/guest" "$@"
	[ "$status" = "$want" ] && [ "$(cat "$dir/out")" = "$output" ]
	verdict "$name" $? "status $status, expected $want; output '$(cat "$dir/out")', expected '$output'"
}

# says NAME TEXT: the last run explained itself with TEXT.
says() {
	grep -q -e "$2" "$dir/err"
	verdict "$1" $? "stderr lacks '$2'"
}

: >"$dir/in"

# mov al,42; out 0xf4,al
hex b0 2a e6 f4
guest "real mode, debug exit" 42 ""
guest "real mode, above 64 KiB" 42 "" --load-addr 0x23450
# A status that belongs to the VMM.
hex b0 ff e6 f4
guest "debug exit is limited" 191 ""
# hlt
hex f4
guest "HLT with interrupts disabled" 0 ""
says "HLT is explained" "halted with interrupts disabled"

# PE set, PG clear, shifts are of 32 bits: exit 0x5a
hex 0f 20 c0 bb ff ff ff ff c1 eb 1f 25 01 00 00 80 \
    83 f8 01 75 09 83 fb 01 75 04 b0 5a e6 f4 b0 01 e6 f4
guest "protected mode" 90 "" --mode protected
# CR4.PAE (1) + a 64-bit shift (1) + 40
hex 0f 20 e0 48 c1 e8 05 48 83 e0 01 48 b9 00 00 00 \
    00 01 00 00 00 48 c1 e9 20 48 01 c8 04 28 e6 f4
guest "long mode" 42 "" --mode long

# rep outsb of "string\n" to the serial port, rep insw from an empty one,
# exit with the last byte read & 0x55
hex be 1e 7c b9 07 00 ba f8 03 fc f3 6e bf 00 05 b9 \
    03 00 ba 00 02 f3 6d a0 05 05 24 55 e6 f4 73 74 \
    72 69 6e 67 0a
guest "string port I/O" 85 "string"

# A dword store and load, then a byte load, where there is no memory: all ones & 0x7f
hex c7 05 00 00 00 d0 78 56 34 12 a1 00 00 00 d0 40 \
    75 09 a0 ff 0f 00 d0 24 7f e6 f4 b0 01 e6 f4
guest "MMIO reads all ones" 127 "" --mode protected

# PIT channel 0 at 1 kHz through the PIC: three interrupts, exit 3. With HLT, then spinning.
hex c7 06 20 00 39 7c c7 06 22 00 00 00 b0 11 e6 20 \
    b0 08 e6 21 b0 04 e6 21 b0 01 e6 21 b0 fe e6 21 \
    b0 34 e6 43 b0 a9 e6 40 b0 04 e6 40 31 db fb f4 \
    80 fb 03 72 fa 88 d8 e6 f4 43 b0 20 e6 20 cf
guest "timer interrupts wake from HLT" 3 ""
hex c7 06 20 00 39 7c c7 06 22 00 00 00 b0 11 e6 20 \
    b0 08 e6 21 b0 04 e6 21 b0 01 e6 21 b0 fe e6 21 \
    b0 34 e6 43 b0 a9 e6 40 b0 04 e6 40 31 db fb 90 \
    80 fb 03 72 fa 88 d8 e6 f4 43 b0 20 e6 20 cf
guest "timer interrupts reach a spinning guest" 3 ""
# PIT channel 2 in mode 0 until port 0x61 shows its output, exit 4
hex e4 61 24 fd 0c 01 e6 61 b0 b0 e6 43 b0 ff e6 42 \
    e6 42 e4 61 a8 20 74 fa b0 04 e6 f4
guest "timer channel 2 through port 0x61" 4 ""

# IRQ 4 for each byte received: sent back plus one; after three, exit 9
hex c7 06 30 00 33 7c c7 06 32 00 00 00 b0 11 e6 20 \
    b0 08 e6 21 b0 04 e6 21 b0 01 e6 21 b0 ef e6 21 \
    ba f9 03 b0 01 ee 31 db fb f4 80 fb 03 72 fa b0 \
    09 e6 f4 ba fd 03 ec a8 01 74 0a ba f8 03 ec fe \
    c0 ee 43 eb ee b0 20 e6 20 cf
printf abc >"$dir/in"
guest "serial input interrupts" 9 "bcd"
: >"$dir/in"

# The clock's century in BCD
hex b0 32 e6 70 e4 71 e6 f4
guest "clock tells the century" 32 ""

# mov al,0xfe; out 0x64,al / in al,0x92; or al,1; out 0x92,al / mov dx,0xcf9; mov al,6; out dx,al
hex b0 fe e6 64 eb fe
guest "reset by the keyboard controller" 0 ""
hex e4 92 0c 01 e6 92 eb fe
guest "reset by port 0x92" 0 ""
hex ba f9 0c b0 06 ee eb fe
guest "reset by port 0xcf9" 0 ""

# mov dx,0x606; mov al,0x34; out dx,al: sleep control, type 5 and "go"
hex ba 06 06 b0 34 ee eb fe
guest "ACPI power off" 0 "" --irqchip split
says "ACPI power off is explained" "sleep control"
# mov dx,0x605; mov al,0x34; out dx,al: the upper half of PM1 control
hex ba 05 06 b0 34 ee eb fe
guest "ACPI power off by PM1 control" 0 "" --irqchip kernel

# The first of several processors ends all, which wait to be started.
hex b0 2a e6 f4
guest "debug exit with four processors" 42 "" --irqchip split --cpus 4
guest "debug exit with all controllers in the kernel" 42 "" --irqchip kernel --cpus 4
hex eb fe
guest "timeout with three processors" 198 "" --irqchip split --cpus 3 --timeout 1
says "timeout shows all of them" "^vCPU 2:"
guest "one processor without local APIC" 192 "" --cpus 2
says "one processor without local APIC is explained" "needs local APICs"
guest "no disk without I/O APIC" 192 "" --disk "$dir/guest"

# lidt with limit 0; int3. In protected mode, for KVM's emulation of real mode (on a
# processor without unrestricted guest) does not look at the limit.
hex 0f 01 1d 08 00 01 00 cc 00 00 00 00 00 00
guest "triple fault" 193 "" --mode protected
if grep -qw svm /proc/cpuinfo; then
	# SVM leaves the state undefined after a shutdown, and KVM resets the vCPU.
	skip "triple fault shows registers" "no state after SHUTDOWN on SVM"
	skip "triple fault shows the code" "no state after SHUTDOWN on SVM"
else
	says "triple fault shows registers" "^RIP 0000000000010007"
	says "triple fault shows the code" "^code at 0x10007: cc 00"
fi
guest "triple fault as reset" 0 "" --mode protected --triple-fault reset

# jmp to where there is no memory
hex b8 00 00 00 d0 ff e0
guest "fetch from nowhere is an internal error" 194 "" --mode protected
says "internal error shows its suberror" "suberror"

# jmp .
hex eb fe
guest "timeout" 198 "" --timeout 1
says "timeout shows where the guest was" "^code at 0x7c00: eb fe"
timeout -s TERM 2 "$vmm" --device "$device" --no-irqchip --memory 2 --flat "$dir/guest" \
	>"$dir/out" 2>"$dir/err" <"$dir/in"
status=$?
# busybox' timeout says 143, coreutils' 124
[ "$status" = 143 ] || [ "$status" = 124 ]
verdict "SIGTERM ends it" $? "status $status"
says "SIGTERM is told" "signal 15"

vmm --flat "$dir/none"
verdict "no such image" "$((status != 192))" "status $status, expected 192"
hex f4
device=/dev/null
guest "not a KVM device" 192 ""
says "not a KVM device is explained" "KVM_GET_API_VERSION"

echo "1..$number"
exit $failed
