# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# The test kernel. Sourced by scripts/setup.

# build_kernel FLAVOUR DIR: build in DIR/build; DIR/bzImage and DIR/modules are
# what the machine takes. Run again after an interruption, it goes on.
build_kernel() {
	local flavour=$1 dir=$2 fragments=("$TREE/scripts/kernel/plain.config")
	[ "$flavour" = plain ] || fragments+=("$TREE/scripts/kernel/$flavour.config")
	mkdir -p "$dir/build"
	# shellcheck disable=SC2016
	"$TREE/scripts/in-root" bash -euc '
		src=$1 dir=$2
		shift 2
		out=$dir/build
		export KBUILD_BUILD_TIMESTAMP=@0 KBUILD_BUILD_USER=rkvm KBUILD_BUILD_HOST=testbed
		cd "$src"
		make -s LLVM=1 O="$out" tinyconfig
		scripts/kconfig/merge_config.sh -m -O "$out" "$out/.config" "$@" >/dev/null
		make -s LLVM=1 O="$out" olddefconfig
		make LLVM=1 O="$out" rustavailable
		# Of an option given twice the last counts; each must have taken.
		cat "$@" | awk -F= "
			/^CONFIG_/ { want[\$1] = substr(\$0, length(\$1) + 2) }
			END { for (o in want) print o \"=\" want[o] }" >"$dir/wanted"
		bad=0
		while IFS== read -r option value; do
			have=$(sed -n "s/^$option=//p" "$out/.config")
			[ "${have:-n}" = "$value" ] || { echo "$option is ${have:-n}, not $value"; bad=1; }
		done <"$dir/wanted"
		[ $bad = 0 ] || exit 1
		make LLVM=1 O="$out" -j"$(nproc)" bzImage modules
		cp "$out/arch/x86/boot/bzImage" "$dir/bzImage"
		rm -rf "$dir/modules"
		mkdir "$dir/modules"
		sed "s/\.o$/.ko/" "$out/modules.order" | (cd "$out" && xargs cp -t "$dir/modules")
		# Objects that no module build looks at; two flavours are 1 GB of them.
		find "$out" -name "*.o" -not -path "*/scripts/*" -not -path "*/tools/*" \
			-not -path "*/rust/*" -not -name module.lds -not -name .module-common.o -delete
		find "$out" -name "*.a" -delete
	' kernel "$CACHE/$(source_key)" "$dir" "${fragments[@]}"
}
