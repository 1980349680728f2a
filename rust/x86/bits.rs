// SPDX-License-Identifier: GPL-2.0

//! The one macro behind every register of named bits.

/// Defines a register (or a word of an ABI) as a newtype with named bits.
///
/// Each flag needs a doc comment. The type keeps bits that have no name: a guest may set them, and it is for the checks
/// in [`cr`](super::cr) and [`msr`](super::msr) to refuse them.
macro_rules! bit_flags {
    (
        $(#[$outer:meta])*
        $vis:vis struct $name:ident($ty:ty) {
            $( $(#[$inner:meta])* $flag:ident = $value:expr; )*
        }
    ) => {
        $(#[$outer])*
        #[derive(Clone, Copy, PartialEq, Eq, Default)]
        #[repr(transparent)]
        $vis struct $name($ty);

        // A register's operations are all there, whichever of them its users happen to need.
        #[allow(dead_code)]
        impl $name {
            $( $(#[$inner])* $vis const $flag: Self = Self($value); )*

            /// Every bit that has a name.
            $vis const NAMED: Self = Self(0 $( | $value )*);

            /// The register with these raw bits, named or not.
            #[inline]
            #[must_use]
            $vis const fn new(bits: $ty) -> Self {
                Self(bits)
            }

            /// The register with no bit set.
            #[inline]
            #[must_use]
            $vis const fn empty() -> Self {
                Self(0)
            }

            /// The raw bits.
            #[inline]
            #[must_use]
            $vis const fn bits(self) -> $ty {
                self.0
            }

            /// Whether no bit is set.
            #[inline]
            #[must_use]
            $vis const fn is_empty(self) -> bool {
                self.0 == 0
            }

            /// Whether all the bits of `flags` are set.
            #[inline]
            #[must_use]
            $vis const fn has(self, flags: Self) -> bool {
                self.0 & flags.0 == flags.0
            }

            /// Whether any bit of `flags` is set.
            #[inline]
            #[must_use]
            $vis const fn has_any(self, flags: Self) -> bool {
                self.0 & flags.0 != 0
            }

            /// The register with the bits of `flags` set too.
            #[inline]
            #[must_use]
            $vis const fn with(self, flags: Self) -> Self {
                Self(self.0 | flags.0)
            }

            /// The register with the bits of `flags` clear.
            #[inline]
            #[must_use]
            $vis const fn without(self, flags: Self) -> Self {
                Self(self.0 & !flags.0)
            }

            /// The register with the bits of `flags` set if `on`, else clear.
            #[inline]
            #[must_use]
            $vis const fn with_if(self, flags: Self, on: bool) -> Self {
                if on {
                    self.with(flags)
                } else {
                    self.without(flags)
                }
            }

            /// The bits that both have.
            #[inline]
            #[must_use]
            $vis const fn and(self, other: Self) -> Self {
                Self(self.0 & other.0)
            }

            /// The bits in which the two differ.
            #[inline]
            #[must_use]
            $vis const fn diff(self, other: Self) -> Self {
                Self(self.0 ^ other.0)
            }
        }

        impl core::ops::BitOr for $name {
            type Output = Self;

            #[inline]
            fn bitor(self, other: Self) -> Self {
                self.with(other)
            }
        }

        impl core::ops::BitOrAssign for $name {
            #[inline]
            fn bitor_assign(&mut self, other: Self) {
                self.0 |= other.0;
            }
        }

        impl core::ops::BitAnd for $name {
            type Output = Self;

            #[inline]
            fn bitand(self, other: Self) -> Self {
                self.and(other)
            }
        }

        impl core::fmt::Debug for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
    };
}

pub(crate) use bit_flags;
