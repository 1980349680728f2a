# SPDX-License-Identifier: GPL-2.0
# The commands of the project; scripts/ does the work. See README and
# Documentation/testing.rst.

# A kernel's build tree. Without one: the testbed's kernel, if there, or the
# running one's.
KDIR ?=
# make test T=PATTERN runs only the tests whose name matches; so does make selftests.
T ?=
# make selftests RECORD=1 writes down what came of them.
RECORD ?=
# make selftests EPT=0 and make bench EPT=0: both modules without EPT.
EPT ?=

.PHONY: all run qemu test test-full guests-full qemu-full selftests bench shell check clean distclean

all:
	@scripts/build $(KDIR)

run:
	@scripts/run

# MACHINE, CPUS, IRQCHIP, DEVICE, ARGS and RUN go to it by the environment.
qemu:
	@scripts/qemu

test:
	@scripts/test $(if $(T),'$(T)')

test-full:
	@RKVM_TEST_FULL=1 scripts/test $(if $(T),'$(T)')

guests-full:
	@RKVM_GUESTS_FULL=1 scripts/test '$(if $(T),$(T),^smp-)'

qemu-full:
	@RKVM_QEMU_FULL=1 scripts/test '$(if $(T),$(T),^qemu-)'

selftests:
	@scripts/selftests $(if $(EPT),--ept=$(EPT)) $(if $(RECORD),--record) $(if $(T),'$(T)')

bench:
	@scripts/bench $(if $(EPT),--ept=$(EPT))

shell:
	@scripts/shell

check:
	@scripts/check

clean:
	rm -rf build

distclean: clean
	@scripts/setup distclean
