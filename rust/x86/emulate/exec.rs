// SPDX-License-Identifier: GPL-2.0

//! What each instruction does.

use super::super::insn::AluOp;
use super::super::insn::BitOp;
use super::super::insn::Insn;
use super::super::insn::MemRef;
use super::super::insn::Op;
use super::super::insn::Operand;
use super::super::insn::Size;
use super::super::paging::GuestMemory;
use super::super::regs::Gpr;
use super::super::regs::Rflags;
use super::super::segment::AccessKind;
use super::super::segment::SegReg;
use super::access::Run;
use super::access::Stop;
use super::access::Target;
use super::alu;
use super::system;
use super::Cpu;

/// A destination that is read and then written: a register, or translated memory.
enum Place {
    Register(Operand),
    Memory(Target),
}

const RAX: Operand = Operand::Reg(Gpr::Rax);
const RDX: Operand = Operand::Reg(Gpr::Rdx);

impl<C: Cpu, M: GuestMemory> Run<'_, C, M> {
    /// Carries out an instruction, or an iteration of a string one. Says whether it has retired.
    pub(super) fn execute(&mut self, insn: &Insn) -> Result<bool, Stop<M::Error>> {
        if let Op::String(op) = insn.op {
            return self.string(insn, op);
        }
        if let Op::System(op) = insn.op {
            return system::execute(self, insn, op);
        }
        self.operate(insn)?;
        self.commit(insn, true)?;
        Ok(true)
    }

    /// The value of an operand.
    pub(super) fn value(
        &mut self,
        insn: &Insn,
        operand: Operand,
        size: Size,
    ) -> Result<u64, Stop<M::Error>> {
        match operand {
            Operand::Mem(mem) => {
                let offset = self.effective_address(insn, &mem, 0);
                self.read(mem.seg, offset, size)
            }
            other => self.register(other, size),
        }
    }

    /// Puts down that an operand gets a value, without reading it.
    pub(super) fn assign(
        &mut self,
        insn: &Insn,
        operand: Operand,
        size: Size,
        value: u64,
    ) -> Result<(), Stop<M::Error>> {
        match operand {
            Operand::Mem(mem) => {
                let offset = self.effective_address(insn, &mem, 0);
                let target = self.target(mem.seg, offset, size, AccessKind::Write)?;
                self.store(target, value, None)
            }
            other => self.set_register(other, size, value),
        }
    }

    /// Reads the destination of a read-modify-write instruction; the rights are those of a write from the start.
    fn open(
        &mut self,
        insn: &Insn,
        operand: Operand,
        size: Size,
    ) -> Result<(Place, u64), Stop<M::Error>> {
        match operand {
            Operand::Mem(mem) => {
                let offset = self.effective_address(insn, &mem, 0);
                self.open_memory(mem.seg, offset, size)
            }
            other => {
                let value = self.register(other, size)?;
                Ok((Place::Register(other), value))
            }
        }
    }

    fn open_memory(
        &mut self,
        seg: SegReg,
        offset: u64,
        size: Size,
    ) -> Result<(Place, u64), Stop<M::Error>> {
        let target = self.target(seg, offset, size, AccessKind::Write)?;
        let value = self.load(&target)?;
        Ok((Place::Memory(target), value))
    }

    /// Puts down the new value of a place that was `old`.
    fn close(
        &mut self,
        place: Place,
        size: Size,
        old: u64,
        new: u64,
        locked: bool,
    ) -> Result<(), Stop<M::Error>> {
        match place {
            Place::Register(operand) => self.set_register(operand, size, new),
            Place::Memory(target) => self.store(target, new, locked.then_some(old)),
        }
    }

    /// `dst = f(dst)`, with flags.
    pub(super) fn modify(
        &mut self,
        insn: &Insn,
        f: impl FnOnce(u64, Rflags) -> (u64, Rflags),
    ) -> Result<(), Stop<M::Error>> {
        let (place, old) = self.open(insn, insn.dst, insn.size)?;
        let (new, flags) = f(old, self.flags());
        self.set_flags(flags);
        self.close(place, insn.size, old, new, insn.lock)
    }

    fn operate(&mut self, insn: &Insn) -> Result<(), Stop<M::Error>> {
        let size = insn.size;
        match insn.op {
            Op::Mov => {
                let value = self.value(insn, insn.src, size)?;
                self.assign(insn, insn.dst, size, value)
            }
            Op::MovZx(from) => {
                let value = self.value(insn, insn.src, from)?;
                self.assign(insn, insn.dst, size, value)
            }
            Op::MovSx(from) => {
                let value = self.value(insn, insn.src, from)?;
                self.assign(insn, insn.dst, size, from.sign_extend(value))
            }
            Op::MovBe => {
                let value = self.value(insn, insn.src, size)?;
                let swapped = value.swap_bytes() >> 64u32.wrapping_sub(size.bits()).min(63);
                self.assign(insn, insn.dst, size, swapped)
            }
            Op::Lea => {
                let Operand::Mem(mem) = insn.src else {
                    return Err(Stop::Unhandled);
                };
                let address = self.effective_address(insn, &mem, 0);
                self.assign(insn, insn.dst, size, address)
            }
            Op::Xchg => {
                let new = self.register(insn.src, size)?;
                let (place, old) = self.open(insn, insn.dst, size)?;
                self.set_register(insn.src, size, old)?;
                // With memory it is locked, prefix or not.
                self.close(place, size, old, new, true)
            }
            Op::Alu(AluOp::Cmp) => {
                let a = self.value(insn, insn.dst, size)?;
                let b = self.value(insn, insn.src, size)?;
                let (_, flags) = alu::alu(AluOp::Cmp, size, a, b, self.flags());
                self.set_flags(flags);
                Ok(())
            }
            Op::Alu(op) => {
                let b = self.value(insn, insn.src, size)?;
                self.modify(insn, |a, flags| alu::alu(op, size, a, b, flags))
            }
            Op::Test => {
                let a = self.value(insn, insn.dst, size)?;
                let b = self.value(insn, insn.src, size)?;
                let (_, flags) = alu::alu(AluOp::And, size, a, b, self.flags());
                self.set_flags(flags);
                Ok(())
            }
            Op::Not => self.modify(insn, |a, flags| (!a & size.mask(), flags)),
            Op::Neg => self.modify(insn, |a, flags| alu::neg(size, a, flags)),
            Op::Inc => self.modify(insn, |a, flags| alu::inc_dec(false, size, a, flags)),
            Op::Dec => self.modify(insn, |a, flags| alu::inc_dec(true, size, a, flags)),
            Op::Shift(op) => {
                let count = self.register(insn.src, Size::Byte)?;
                self.modify(insn, |a, flags| alu::shift(op, size, a, count, flags))
            }
            Op::Bit(op) => self.bit(insn, op),
            Op::CmpXchg => self.compare_exchange(insn),
            Op::CmpXchg8b => self.compare_exchange_8b(insn),
            Op::CmpXchg16b => self.compare_exchange_16b(insn),
            Op::Xadd => {
                let addend = self.register(insn.src, size)?;
                let (place, old) = self.open(insn, insn.dst, size)?;
                let (new, flags) = alu::alu(AluOp::Add, size, old, addend, self.flags());
                self.set_flags(flags);
                self.set_register(insn.src, size, old)?;
                self.close(place, size, old, new, insn.lock)
            }
            Op::Imul => {
                let (a, b) = match insn.src2 {
                    Operand::None => (insn.dst, insn.src),
                    constant => (constant, insn.src),
                };
                let a = self.register(a, size)?;
                let b = self.value(insn, b, size)?;
                let (product, flags) = alu::imul(size, a, b, self.flags());
                self.set_flags(flags);
                self.assign(insn, insn.dst, size, product)
            }
            Op::Mul { signed } => self.multiply(insn, signed),
            Op::Div { signed } => self.divide(insn, signed),
            Op::Mulx => self.multiply_plain(insn),
            Op::DoubleShift { left } => self.double_shift(insn, left),
            Op::ByteSwap => {
                let value = self.register(insn.dst, size)?;
                // Of a word, the SDM says that it is undefined; processors give zero.
                let swapped = match size {
                    Size::Byte | Size::Word => 0,
                    Size::Dword => (value as u32).swap_bytes().into(),
                    Size::Qword => value.swap_bytes(),
                };
                self.set_register(insn.dst, size, swapped)
            }
            Op::Scan(op) => self.scan(insn, op),
            Op::Crc32(from) => self.crc32(insn, from),
            Op::Adcx => self.add_carry(insn, Rflags::CF),
            Op::Adox => self.add_carry(insn, Rflags::OF),
            Op::Bmi(op) => self.bmi(insn, op),
            Op::SignToRdx => self.sign_to_rdx(insn),
            Op::Xlat => self.xlat(insn),
            Op::Sahf => self.sahf(),
            Op::Lahf => self.lahf(),
            Op::Flag(op) => self.change_flag(op),
            Op::Salc => self.salc(),
            Op::Bcd(op) => self.bcd(insn, op),
            Op::Bound => self.bound(insn),
            Op::Arpl => self.arpl(insn),
            Op::Cmov(condition) => {
                // The source is read and the upper half cleared whether or not the condition holds.
                let new = self.value(insn, insn.src, size)?;
                let old = self.register(insn.dst, size)?;
                let holds = alu::condition(condition, self.flags());
                self.assign(insn, insn.dst, size, if holds { new } else { old })
            }
            Op::Set(condition) => {
                let holds = alu::condition(condition, self.flags());
                self.assign(insn, insn.dst, Size::Byte, u64::from(holds))
            }
            Op::Push => self.push(insn),
            Op::Pop => self.pop(insn),
            Op::PushAll => self.push_all(insn),
            Op::PopAll => self.pop_all(insn),
            Op::PushFlags => self.push_flags(insn),
            Op::PopFlags => self.pop_flags(insn),
            Op::Enter => self.enter(insn),
            Op::Leave => self.leave(insn),
            Op::Call => self.call(insn),
            Op::Jump => self.jump(insn),
            Op::Branch(condition) => self.jump_if(insn, condition),
            Op::Loop(op) => self.count_and_jump(insn, op),
            Op::Return => self.return_near(insn),
            Op::Vector(op, set) => self.vector(insn, op, set),
            Op::LoadMxcsr(set) => self.load_mxcsr(insn, set),
            Op::StoreMxcsr(set) => self.store_mxcsr(insn, set),
            Op::X87(op) => self.x87(insn, op),
            Op::Nop => Ok(()),
            Op::Flush => {
                let Operand::Mem(mem) = insn.src else {
                    return Err(Stop::Unhandled);
                };
                let offset = self.effective_address(insn, &mem, 0);
                self.target(mem.seg, offset, Size::Byte, AccessKind::Read)?;
                Ok(())
            }
            Op::String(_) | Op::System(_) => Err(Stop::Unhandled),
        }
    }

    fn bit(&mut self, insn: &Insn, op: BitOp) -> Result<(), Stop<M::Error>> {
        let size = insn.size;
        let index = self.register(insn.src, size)?;
        let position = index & u64::from(size.bits()).wrapping_sub(1);
        let mask = 1u64 << (position & 63);
        let change = |old: u64| match op {
            BitOp::Test => old,
            BitOp::Set => old | mask,
            BitOp::Reset => old & !mask,
            BitOp::Complement => old ^ mask,
        };
        let operand = match insn.dst {
            Operand::Mem(mem) => Operand::Mem(self.bit_string(insn, mem, index)),
            other => other,
        };
        let old = if op == BitOp::Test {
            self.value(insn, operand, size)?
        } else {
            let (place, old) = self.open(insn, operand, size)?;
            self.close(place, size, old, change(old), insn.lock)?;
            old
        };
        let flags = self.flags().with_if(Rflags::CF, old & mask != 0);
        self.set_flags(flags);
        Ok(())
    }

    /// A register counts bits from the start of memory in both directions, beyond the operand; a constant does not.
    fn bit_string(&mut self, insn: &Insn, mem: MemRef, index: u64) -> MemRef {
        if !matches!(insn.src, Operand::Reg(_)) {
            return mem;
        }
        let signed = insn.size.sign_extend(index) as i64;
        let log2_bits = insn.size.bits().trailing_zeros();
        let units = (signed >> log2_bits) as u64;
        let bytes = units.wrapping_mul(u64::from(insn.size.bytes()));
        MemRef {
            disp: mem.disp.wrapping_add(bytes),
            ..mem
        }
    }

    fn compare_exchange(&mut self, insn: &Insn) -> Result<(), Stop<M::Error>> {
        let size = insn.size;
        let accumulator = self.register(RAX, size)?;
        let new = self.register(insn.src, size)?;
        let (place, old) = self.open(insn, insn.dst, size)?;
        let (_, flags) = alu::alu(AluOp::Cmp, size, accumulator, old, self.flags());
        self.set_flags(flags);
        if flags.has(Rflags::ZF) {
            return self.close(place, size, old, new, insn.lock);
        }
        self.set_register(RAX, size, old)?;
        // Memory is written in any case (SDM vol. 2, CMPXCHG); a register keeps even its upper half.
        match place {
            Place::Memory(_) => self.close(place, size, old, old, insn.lock),
            Place::Register(_) => Ok(()),
        }
    }

    fn compare_exchange_8b(&mut self, insn: &Insn) -> Result<(), Stop<M::Error>> {
        let accumulator = self.pair(Gpr::Rdx, Gpr::Rax);
        let new = self.pair(Gpr::Rcx, Gpr::Rbx);
        let (place, old) = self.open(insn, insn.dst, Size::Qword)?;
        let equal = accumulator == old;
        let flags = self.flags().with_if(Rflags::ZF, equal);
        self.set_flags(flags);
        if !equal {
            self.set_register(RAX, Size::Dword, old)?;
            self.set_register(RDX, Size::Dword, old >> 32)?;
        }
        let value = if equal { new } else { old };
        self.close(place, Size::Qword, old, value, insn.lock)
    }

    /// It is written in two halves, even if locked: it gets here for a device's sake, where nothing is atomic.
    fn compare_exchange_16b(&mut self, insn: &Insn) -> Result<(), Stop<M::Error>> {
        let Operand::Mem(mem) = insn.dst else {
            return Err(Stop::Unhandled);
        };
        let offset = self.effective_address(insn, &mem, 0);
        let wide = self.wide_target(mem.seg, offset, 16, Some(16), AccessKind::Write)?;
        let [low, high, ..] = self.load_wide(&wide)?;
        let equal = low == self.gpr(Gpr::Rax) && high == self.gpr(Gpr::Rdx);
        let flags = self.flags().with_if(Rflags::ZF, equal);
        self.set_flags(flags);
        if equal {
            let new = [self.gpr(Gpr::Rbx), self.gpr(Gpr::Rcx), 0, 0];
            return self.store_wide(&wide, new);
        }
        self.set_register(RAX, Size::Qword, low)?;
        self.set_register(RDX, Size::Qword, high)?;
        self.store_wide(&wide, [low, high, 0, 0])
    }

    fn pair(&mut self, high: Gpr, low: Gpr) -> u64 {
        let mask = Size::Dword.mask();
        (self.gpr(high) << 32) | (self.gpr(low) & mask)
    }
}
