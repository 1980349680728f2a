// SPDX-License-Identifier: GPL-2.0

//! The timer in the kernel, an 8254: its state, its ports, its ticks. Rates are compared with the
//! host's clock, and only roughly: the host may have other things to do.

use kvm_bindings as kb;
use selftests::check::{difference, expect_errno};
use selftests::guest::PORT;
use selftests::host::{patient, sleep_ms};
use selftests::irq::{
    self, how, line_status, pic, route, set_entry, to_pin, vm_with, wait_for, Chips, Guest, APIC,
};
use selftests::machine::Exit;
use selftests::sys::{self, Error};
use selftests::vm::Vm;
use selftests::{ensure, ensure_eq, fail, guest_code, skip, tests, Env, Outcome, Verdict};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// The clock of the timer.
const HERTZ: f64 = 1_193_182.0;
/// What counts down in 10 ms.
const CENTISECOND: u16 = 11_932;

/// The vector of GSI 0 at the PIC, and at the I/O APIC.
const AT_PIC: u8 = 0x40;
const AT_IOAPIC: u8 = 0x50;

/// Ports: the channels' counters, the control word, the speaker.
const COUNTER: u16 = 0x40;
const CONTROL: u16 = 0x43;
const SPEAKER: u16 = 0x61;

fn create(vm: &Vm, flags: u32) -> Result<(), Error> {
    let c = kb::kvm_pit_config {
        flags,
        ..Default::default()
    };
    vm.fd.ioctl_ref(sys::KVM_CREATE_PIT2, &c)?;
    Ok(())
}

fn get(vm: &Vm) -> Result<kb::kvm_pit_state2, Error> {
    let mut s = kb::kvm_pit_state2::default();
    vm.fd.ioctl_mut(sys::KVM_GET_PIT2, &mut s)?;
    Ok(s)
}

fn set(vm: &Vm, s: &kb::kvm_pit_state2) -> Result<(), Error> {
    vm.fd.ioctl_ref(sys::KVM_SET_PIT2, s)?;
    Ok(())
}

/// Whether ticks that the guest could not take are made up for.
fn reinject(vm: &Vm, on: u8) -> Result<(), Error> {
    let r = kb::kvm_reinject_control {
        pit_reinject: on,
        reserved: [0xff; 31],
    };
    vm.fd.ioctl_ref(sys::KVM_REINJECT_CONTROL, &r)?;
    Ok(())
}

fn need(env: &Env) -> Outcome {
    if env.open()?.capability(kb::KVM_CAP_PIT2) <= 0 {
        skip!("no KVM_CAP_PIT2");
    }
    Ok(())
}

/// A guest with a timer, and a PIC that is initialised.
fn guest(env: &Env) -> Result<Guest, Verdict> {
    need(env)?;
    let g = Guest::new(env, Chips::Full, 1)?;
    create(&g.vm, kb::KVM_PIT_SPEAKER_DUMMY)?;
    for (port, value) in [
        (0x20, 0x11),
        (0x21, AT_PIC),
        (0x21, 4),
        (0x21, 1),
        (0x21, 0xfe),
    ] {
        g.out8(port, value)?;
    }
    g.set_how(0, how::MASTER);
    Ok(g)
}

/// A control word: the channel, which bytes are accessed (1 the low, 2 the high, 3 both), the mode.
fn control(channel: u8, bytes: u8, mode: u8) -> u8 {
    (channel << 6) | (bytes << 4) | (mode << 1)
}

/// The read-back command for one channel; what it does not latch: 0x10 the status, 0x20 the counter.
fn read_back(channel: u16, except: u8) -> u8 {
    0xc0 | except | (2 << channel)
}

/// Programs a channel: the mode, and the counter in two bytes.
fn program(g: &Guest, channel: u8, mode: u8, count: u16) -> Outcome {
    g.out8(CONTROL, control(channel, 3, mode))?;
    let [low, high] = count.to_le_bytes();
    g.out8(COUNTER + u16::from(channel), low)?;
    g.out8(COUNTER + u16::from(channel), high)
}

/// Reads two bytes of a channel's counter.
fn word(g: &Guest, channel: u16) -> Result<u16, Verdict> {
    Ok(u16::from_le_bytes([
        g.in8(COUNTER + channel)?,
        g.in8(COUNTER + channel)?,
    ]))
}

/// Lets the time that some ticks take go by, and the guest take them; how many in how many seconds.
fn ticks(g: &Guest, vector: u8, ms: u64) -> Result<(u64, f64), Verdict> {
    let (start, before) = (Instant::now(), g.count(0, vector));
    let n = g.running(irq::idle(), |_| {
        sleep_ms(ms);
        Ok(g.count(0, vector) - before)
    })?;
    Ok((n, start.elapsed().as_secs_f64()))
}

fn creation(env: &Env) -> Outcome {
    need(env)?;
    let kvm = env.open()?;
    for (cap, name) in [
        (kb::KVM_CAP_PIT, "PIT"),
        (kb::KVM_CAP_PIT2, "PIT2"),
        (kb::KVM_CAP_PIT_STATE2, "PIT_STATE2"),
        (kb::KVM_CAP_REINJECT_CONTROL, "REINJECT_CONTROL"),
    ] {
        ensure_eq!(kvm.capability(cap), 1, "KVM_CAP_{name}");
    }
    for chips in [Chips::None, Chips::Split(24)] {
        let (_kvm, vm, _mem) = vm_with(env, chips)?;
        expect_errno(create(&vm, 0), libc::ENOENT, "without a PIC")?;
        let r = vm.fd.ioctl(sys::KVM_CREATE_PIT, 0);
        expect_errno(r, libc::ENOENT, "the older call without a PIC")?;
    }
    let (_kvm, vm, _mem) = vm_with(env, Chips::Full)?;
    let r = vm.fd.ioctl(sys::KVM_CREATE_PIT2, 8);
    expect_errno(r, libc::EFAULT, "no address")?;
    // A vCPU is no obstacle, nor are flags that nobody knows.
    let _vcpu = vm.create_vcpu(0)?;
    create(&vm, 0xffff_fffe)?;
    expect_errno(create(&vm, 0), libc::EEXIST, "a second one")?;
    let r = vm.fd.ioctl(sys::KVM_CREATE_PIT, 0);
    expect_errno(r, libc::EEXIST, "the older call, too late")?;
    let (_kvm, vm, _mem) = vm_with(env, Chips::Full)?;
    vm.fd.ioctl(sys::KVM_CREATE_PIT, 0)?;
    expect_errno(create(&vm, 0), libc::EEXIST, "behind the older call")
}

/// The calls without a timer, and with wrong addresses.
fn refusals(env: &Env) -> Outcome {
    need(env)?;
    let (_kvm, vm, _mem) = vm_with(env, Chips::Full)?;
    expect_errno(get(&vm).map(|_| ()), libc::ENXIO, "get")?;
    expect_errno(set(&vm, &kb::kvm_pit_state2::default()), libc::ENXIO, "set")?;
    let mut old = kb::kvm_pit_state::default();
    let r = vm.fd.ioctl_mut(sys::KVM_GET_PIT, &mut old);
    expect_errno(r, libc::ENXIO, "the older get")?;
    let r = vm.fd.ioctl_ref(sys::KVM_SET_PIT, &old);
    expect_errno(r, libc::ENXIO, "the older set")?;
    expect_errno(reinject(&vm, 1), libc::ENXIO, "control of ticks")?;
    create(&vm, 0)?;
    for call in [
        sys::KVM_GET_PIT,
        sys::KVM_SET_PIT,
        sys::KVM_GET_PIT2,
        sys::KVM_SET_PIT2,
        sys::KVM_REINJECT_CONTROL,
    ] {
        expect_errno(vm.fd.ioctl(call, 8), libc::EFAULT, call.name)?;
    }
    Ok(())
}

fn state(env: &Env) -> Outcome {
    need(env)?;
    let (_kvm, vm, _mem) = vm_with(env, Chips::Full)?;
    create(&vm, 0)?;
    let new = get(&vm)?;
    ensure_eq!((new.flags, new.reserved), (0, [0; 9]), "flags of a new one");
    for (i, c) in new.channels.iter().enumerate() {
        let got = (c.count, c.gate, c.count_latched, c.status_latched);
        ensure_eq!(got, (0x1_0000, u8::from(i != 2), 0, 0), "new channel {i}");
    }
    // Channels 1 and 2 send nothing, so that they can be given anything.
    let mut want = new;
    for (i, c) in want.channels.iter_mut().enumerate().skip(1) {
        let i = i as u8;
        *c = kb::kvm_pit_channel_state {
            count: 0x1234 + u32::from(i),
            latched_count: 0xabcd,
            count_latched: 3,
            status_latched: 1,
            status: 0x5a + i,
            read_state: 3,
            write_state: 4,
            write_latch: 0x77,
            rw_mode: 2 + i % 2,
            mode: 2 + i,
            bcd: 1,
            gate: 1,
            count_load_time: 0,
        };
    }
    want.flags = kb::KVM_PIT_FLAGS_SPEAKER_DATA_ON;
    want.reserved = [0xffff_ffff; 9];
    set(&vm, &want)?;
    let mut got = get(&vm)?;
    want.reserved = [0; 9];
    for (g, w) in got.channels.iter_mut().zip(&want.channels) {
        // It is when the counter was loaded, and that is now.
        g.count_load_time = w.count_load_time;
    }
    ensure!(got == want, "state: {}", difference(&got, &want));
    let mut old = kb::kvm_pit_state::default();
    vm.fd.ioctl_mut(sys::KVM_GET_PIT, &mut old)?;
    for (g, w) in old.channels.iter_mut().zip(&want.channels) {
        g.count_load_time = w.count_load_time;
    }
    ensure!(old.channels == want.channels, "channels by the older call");
    // The older call leaves the flags. A counter of 0 is the largest.
    old.channels[1].count = 0;
    old.channels[2].mode = 0;
    vm.fd.ioctl_ref(sys::KVM_SET_PIT, &old)?;
    let got = get(&vm)?;
    ensure_eq!(got.channels[1].count, 0x1_0000, "count 0");
    ensure_eq!(got.channels[2].mode, 0, "mode by the older call");
    ensure_eq!(got.flags, kb::KVM_PIT_FLAGS_SPEAKER_DATA_ON, "flags");
    Ok(())
}

/// Control words and counters as the guest writes them.
fn programming(env: &Env) -> Outcome {
    let g = guest(env)?;
    let channel = |i: usize| -> Result<_, Verdict> { Ok(get(&g.vm)?.channels[i]) };
    for i in 1..3u8 {
        let port = COUNTER + u16::from(i);
        // Modes 6 and 7 are 2 and 3.
        for (mode, is) in [
            (0, 0),
            (1, 1),
            (2, 2),
            (3, 3),
            (4, 4),
            (5, 5),
            (6, 2),
            (7, 3),
        ] {
            program(&g, i, mode, 0x1234 + u16::from(mode))?;
            let c = channel(i.into())?;
            let want = (is, 3, 0x1234 + u32::from(mode));
            ensure_eq!(
                (c.mode, c.rw_mode, c.count),
                want,
                "channel {i}: mode, access, count"
            );
        }
        // The low byte only, the high byte only.
        g.out8(CONTROL, control(i, 1, 0) | 1)?;
        g.out8(port, 0x9a)?;
        let c = channel(i.into())?;
        ensure_eq!(
            (c.count, c.rw_mode, c.bcd),
            (0x9a, 1, 1),
            "channel {i}: low byte"
        );
        g.out8(CONTROL, control(i, 2, 0))?;
        g.out8(port, 0x9a)?;
        let c = channel(i.into())?;
        ensure_eq!(
            (c.count, c.rw_mode, c.bcd),
            (0x9a00, 2, 0),
            "channel {i}: high byte"
        );
        // Half of a counter is none.
        g.out8(CONTROL, control(i, 3, 0))?;
        g.out8(port, 0x11)?;
        ensure_eq!(
            channel(i.into())?.count,
            0x9a00,
            "channel {i}: half of a counter"
        );
        g.out8(port, 0)?;
        ensure_eq!(
            channel(i.into())?.count,
            0x11,
            "channel {i}: the other half"
        );
        program(&g, i, 2, 0)?;
        ensure_eq!(channel(i.into())?.count, 0x1_0000, "channel {i}: count 0");
    }
    // The control word cannot be read; nor is it an exit.
    g.in8(CONTROL)?;
    Ok(())
}

/// Latches: the counter stands still until it is read, the status comes first.
fn latches(env: &Env) -> Outcome {
    let g = guest(env)?;
    for i in [0u16, 2] {
        let latch = control(i as u8, 0, 0);
        program(&g, i as u8, 2, 0xffff)?;
        g.out8(CONTROL, latch)?;
        let latched = get(&g.vm)?.channels[usize::from(i)];
        ensure_eq!(latched.count_latched, 3, "latched");
        sleep_ms(2);
        // A second latch changes nothing.
        g.out8(CONTROL, latch)?;
        ensure_eq!(
            word(&g, i)?,
            latched.latched_count,
            "channel {i}: the latched counter"
        );
        let c = get(&g.vm)?.channels[usize::from(i)];
        ensure_eq!(c.count_latched, 0, "channel {i}: latched, once read");
        // By the read-back command: status and counter, of this channel.
        g.out8(CONTROL, read_back(i, 0))?;
        let c = get(&g.vm)?.channels[usize::from(i)];
        ensure_eq!(
            (c.status_latched, c.count_latched),
            (1, 3),
            "channel {i}: read-back"
        );
        let other = get(&g.vm)?.channels[1];
        ensure_eq!(
            (other.status_latched, other.count_latched),
            (0, 0),
            "channel 1"
        );
        let status = g.in8(COUNTER + i)?;
        ensure_eq!(status & 0x3f, control(0, 3, 2), "channel {i}: status");
        ensure_eq!(
            word(&g, i)?,
            c.latched_count,
            "channel {i}: counter behind the status"
        );
        // Only one of them, and one byte at a time.
        g.out8(CONTROL, control(i as u8, 2, 3))?;
        g.out8(COUNTER + i, 0xff)?;
        g.out8(CONTROL, read_back(i, 0x20))?;
        ensure_eq!(
            g.in8(COUNTER + i)? & 0x3f,
            control(0, 2, 3),
            "channel {i}: status alone"
        );
        g.out8(CONTROL, read_back(i, 0x10))?;
        let c = get(&g.vm)?.channels[usize::from(i)];
        ensure_eq!(
            (c.status_latched, c.count_latched),
            (0, 2),
            "channel {i}: counter alone"
        );
        let high = (c.latched_count >> 8) as u8;
        ensure_eq!(g.in8(COUNTER + i)?, high, "channel {i}: the high byte");
    }
    Ok(())
}

/// The counters run down as the host's clock runs.
fn counting(env: &Env) -> Outcome {
    let g = guest(env)?;
    g.out8(SPEAKER, 1)?;
    let latched = |i: u16| -> Result<u16, Verdict> {
        g.out8(CONTROL, control(i as u8, 0, 0))?;
        word(&g, i)
    };
    for (i, mode) in [(0, 2), (2, 2), (2, 0)] {
        program(&g, i as u8, mode, 0)?;
        let mut rounds = 0;
        loop {
            let start = Instant::now();
            let first = latched(i)?;
            let between = Instant::now();
            sleep_ms(5);
            let (least, second) = (between.elapsed().as_secs_f64(), latched(i)?);
            let most = start.elapsed().as_secs_f64();
            let got = f64::from(first.wrapping_sub(second));
            println!(
                "channel {i}, mode {mode}: {got} of {}..{}",
                least * HERTZ,
                most * HERTZ
            );
            // It may have been away longer than the counter is long.
            if most * HERTZ < 60_000.0 {
                ensure!(
                    got > least * HERTZ * 0.9 - 60.0 && got < most * HERTZ * 1.1 + 60.0,
                    "channel {i}: {got} in {least:.6} to {most:.6} s"
                );
                break;
            }
            rounds += 1;
            if rounds == 10 {
                skip!("the host is too slow");
            }
        }
    }
    Ok(())
}

guest_code!(in16, ".code64", "in ax, dx", "ret");

/// The speaker's port: the gate and the output of channel 2.
fn speaker(env: &Env) -> Outcome {
    let g = guest(env)?;
    for bits in 0..4u8 {
        g.out8(SPEAKER, bits | 0xf0)?;
        ensure_eq!(g.in8(SPEAKER)? & 0xf, bits, "gate and data");
        let s = get(&g.vm)?;
        ensure_eq!(s.channels[2].gate, bits & 1, "gate");
        let on = s.flags & kb::KVM_PIT_FLAGS_SPEAKER_DATA_ON != 0;
        ensure_eq!(on, bits & 2 != 0, "data");
    }
    // Mode 0: low until the counter has run down.
    g.out8(SPEAKER, 1)?;
    let mut early = 0xff;
    for _ in 0..10 {
        let start = Instant::now();
        program(&g, 2, 0, 0)?;
        early = g.in8(SPEAKER)?;
        if start.elapsed() < Duration::from_millis(40) {
            break;
        }
    }
    ensure_eq!(early & 0x20, 0, "output before the end");
    sleep_ms(60);
    ensure_eq!(g.in8(SPEAKER)? & 0x20, 0x20, "output behind the end");
    // The refresh toggles.
    let bit = |g: &Guest| -> Result<u8, Verdict> { Ok(g.in8(SPEAKER)? & 0x10) };
    let first = bit(&g)?;
    let mut toggled = false;
    for _ in 0..200 {
        toggled |= bit(&g)? != first;
    }
    ensure!(toggled, "the refresh bit stays {first:#x}");
    // The ports beside it are userspace's; so is this one, without the flag.
    let exits = |g: &Guest, port: u16| -> Outcome {
        g.begin(0, in16(), |r| r.rdx = port.into())?;
        match g.run(0)? {
            Exit::In {
                port: p, size: 2, ..
            } if p == port => {}
            other => fail!("port {port:#x}: exit {other:x?}"),
        }
        g.finish(0, &mut |_| Ok(()))
    };
    exits(&g, SPEAKER + 1)?;
    exits(&g, SPEAKER - 1)?;
    let g = Guest::new(env, Chips::Full, 1)?;
    create(&g.vm, 0)?;
    exits(&g, SPEAKER)?;
    ensure_eq!(g.in8(COUNTER + 2).is_ok(), true, "the counters are there");
    ensure!(PORT != SPEAKER, "the port of this test's own");
    Ok(())
}

/// Whether `n` ticks of `hertz` in so many seconds are about right: none too many, and half of them at
/// least; fewer where everything is slow, as each has to be handled before the next.
fn plausible(env: &Env, n: u64, seconds: f64, hertz: f64, what: &str) -> Outcome {
    println!("{what}: {n} ticks in {seconds:.3} s");
    let want = seconds * hertz;
    // One may be under way at the start, one is, where the pieces do not fit, counted at the end.
    ensure!(
        n as f64 <= want + 2.0,
        "{what}: {n} ticks, {want:.1} are due"
    );
    ensure!(
        n as f64 >= want / (2.0 * f64::from(env.slow)) - 2.0,
        "{what}: {n} ticks, {want:.1} are due"
    );
    Ok(())
}

/// Ticks of the periodic modes, through the PIC, and through the I/O APIC on the pins 0 and 2.
fn periodic(env: &Env) -> Outcome {
    let g = guest(env)?;
    reinject(&g.vm, 0)?;
    let (hertz, ms) = (100.0, 300);
    for mode in [2, 3] {
        program(&g, 0, mode, CENTISECOND)?;
        let (n, seconds) = ticks(&g, AT_PIC, ms)?;
        plausible(env, n, seconds, hertz, &format!("mode {mode}, PIC"))?;
    }
    // Another rate: it holds from when it is written.
    program(&g, 0, 2, CENTISECOND / 2)?;
    let (n, seconds) = ticks(&g, AT_PIC, ms)?;
    plausible(env, n, seconds, 2.0 * hertz, "200 Hz")?;

    g.out8(0x21, 0xff)?;
    g.set_how(0, how::APIC);
    program(&g, 0, 2, CENTISECOND)?;
    set_entry(&g.vm, 0, AT_IOAPIC.into())?;
    let (n, seconds) = ticks(&g, AT_IOAPIC, ms)?;
    plausible(env, n, seconds, hertz, "pin 0")?;
    // As PCs have it.
    route(&g.vm, &[to_pin(0, 2, 2)])?;
    set_entry(&g.vm, 2, u64::from(AT_IOAPIC) + 1)?;
    let (n, seconds) = ticks(&g, AT_IOAPIC + 1, ms)?;
    plausible(env, n, seconds, hertz, "pin 2")?;
    let before = g.seen(0);
    route(&g.vm, &[])?;
    let (n, _) = ticks(&g, AT_IOAPIC + 1, 50)?;
    ensure!(n <= 1, "{n} ticks without a route");
    ensure!(g.seen(0) <= before + 1, "interrupts without a route");
    Ok(())
}

/// Modes 0 and 4 tick once. Mode 5 waits for its gate, which does not move; and so does mode 1, but not
/// KVM's, which ticks once.
fn one_shot(env: &Env) -> Outcome {
    let g = guest(env)?;
    for (mode, least, most) in [(0, 1, 1), (4, 1, 1), (1, 0, 1), (5, 0, 0)] {
        let start = Instant::now();
        program(&g, 0, mode, CENTISECOND * 2)?;
        let before = g.count(0, AT_PIC);
        let first = g.running(irq::idle(), |_| {
            if least == 1 {
                wait_for("the tick", || g.count(0, AT_PIC) > before)?;
            }
            let first = start.elapsed();
            sleep_ms(60);
            Ok(first)
        })?;
        let n = g.count(0, AT_PIC) - before;
        ensure!(n >= least && n <= most, "mode {mode}: {n} ticks");
        if least == 1 {
            ensure!(
                first >= Duration::from_millis(19),
                "mode {mode}: after {first:?}"
            );
            ensure!(
                first < Duration::from_millis(patient(500)),
                "mode {mode}: after {first:?}"
            );
        }
    }
    Ok(())
}

/// Has the guest be away for some ticks and then look for a while: how many it got, how many were due.
fn away(g: &Guest, vector: u8) -> Result<(f64, f64, f64), Verdict> {
    program(g, 0, 2, CENTISECOND)?;
    let start = Instant::now();
    let before = g.count(0, vector);
    sleep_ms(150);
    let back = Instant::now();
    while back.elapsed() < Duration::from_millis(40) {
        g.window(0)?;
    }
    let n = (g.count(0, vector) - before) as f64;
    let (all, late) = (start.elapsed().as_secs_f64(), back.elapsed().as_secs_f64());
    println!(
        "{n} ticks, {:.1} were due, {:.1} of them at the end",
        all * 100.0,
        late * 100.0
    );
    Ok((n, all * 100.0, late * 100.0))
}

/// Ticks that the guest could not take are made up for, one behind each EOI, or they are lost, as
/// KVM_REINJECT_CONTROL says.
fn reinjection(env: &Env) -> Outcome {
    let g = guest(env)?;
    for at_pic in [true, false] {
        let vector = if at_pic { AT_PIC } else { AT_IOAPIC };
        if !at_pic {
            g.out8(0x21, 0xff)?;
            g.set_how(0, how::APIC);
            set_entry(&g.vm, 0, AT_IOAPIC.into())?;
        }
        // They are, if nobody says otherwise.
        for (on, all) in [
            (None, true),
            (Some(0), false),
            (Some(1), true),
            (Some(0), false),
        ] {
            if let Some(on) = on {
                reinject(&g.vm, on)?;
            } else if !at_pic {
                reinject(&g.vm, 1)?;
            }
            let (n, due, late) = away(&g, vector)?;
            ensure!(n <= due + 2.0, "{n} ticks, {due} were due");
            if all {
                ensure!(
                    n >= due * 0.7 - 3.0,
                    "{n} ticks of {due}: they are not made up for"
                );
            } else {
                ensure!(n >= 1.0, "no tick");
                ensure!(
                    n <= late + 3.0,
                    "{n} ticks, {late} since it is back: made up for"
                );
            }
            // None is left for the next round.
            program(&g, 0, 5, 0)?;
            (0..3).try_for_each(|_| g.window(0))?;
        }
    }
    Ok(())
}

/// While the HPET has the ticks, the timer has none.
fn hpet(env: &Env) -> Outcome {
    let g = guest(env)?;
    program(&g, 0, 2, CENTISECOND)?;
    let mut s = get(&g.vm)?;
    s.flags = kb::KVM_PIT_FLAGS_HPET_LEGACY;
    set(&g.vm, &s)?;
    ensure_eq!(get(&g.vm)?.flags, kb::KVM_PIT_FLAGS_HPET_LEGACY, "flags");
    ensure_eq!(get(&g.vm)?.channels[0].mode, 2, "mode");
    g.window(0)?;
    let before = g.seen(0);
    ticks(&g, AT_PIC, 50)?;
    ensure_eq!(g.seen(0), before, "ticks beside the HPET");
    s.flags = 0;
    set(&g.vm, &s)?;
    let (n, seconds) = ticks(&g, AT_PIC, 200)?;
    plausible(env, n, seconds, 100.0, "without the HPET")
}

/// The state, moved to another VM, ticks there.
fn moves(env: &Env) -> Outcome {
    let a = guest(env)?;
    program(&a, 0, 2, CENTISECOND)?;
    let b = guest(env)?;
    set(&b.vm, &get(&a.vm)?)?;
    let (n, seconds) = ticks(&b, AT_PIC, 200)?;
    plausible(env, n, seconds, 100.0, "the other VM")
}

/// GSI 0 is a line still; that of userspace and that of the timer are two sources.
fn line_zero(env: &Env) -> Outcome {
    let g = guest(env)?;
    reinject(&g.vm, 0)?;
    ensure_eq!(line_status(&g.vm, 0, 1)?, 1, "status");
    g.window(0)?;
    ensure_eq!(g.log(0), [AT_PIC], "vectors");
    // While that line is up, a tick is no edge.
    program(&g, 0, 2, CENTISECOND)?;
    let (n, _) = ticks(&g, AT_PIC, 50)?;
    ensure_eq!(n, 0, "ticks while the line is up");
    ensure_eq!(pic(&g.vm, 0)?.last_irr & 1, 1, "line");
    irq::line(&g.vm, 0, 0)?;
    let (n, seconds) = ticks(&g, AT_PIC, 200)?;
    plausible(env, n, seconds, 100.0, "once it is down")
}

/// Shorter periods than the host can bear: they are as long as it likes, and nothing gets stuck.
fn shortest(env: &Env) -> Outcome {
    let g = guest(env)?;
    for on in [0, 1] {
        for count in [1, 2, 100] {
            reinject(&g.vm, on)?;
            program(&g, 0, 2, count)?;
            let (start, before) = (Instant::now(), g.count(0, AT_PIC));
            g.running(irq::idle(), |_| {
                wait_for("a tick", || g.count(0, AT_PIC) > before)?;
                sleep_ms(20);
                let (n, most) = (
                    g.count(0, AT_PIC) - before,
                    start.elapsed().as_secs_f64() * HERTZ / f64::from(count),
                );
                println!("count {count}: {n} ticks");
                ensure!(n as f64 <= most + 2.0, "count {count}: {n} of {most} ticks");
                // A guest that is slower than its ticks would never come to an end.
                let mut s = get(&g.vm)?;
                s.channels[0].mode = 5;
                set(&g.vm, &s)?;
                reinject(&g.vm, 0)?;
                Ok(())
            })?;
        }
    }
    Ok(())
}

/// A LINT0 that is an NMI gets the ticks as NMIs: a watchdog's.
fn watchdog(env: &Env) -> Outcome {
    let g = guest(env)?;
    reinject(&g.vm, 0)?;
    g.write(0, APIC + 0x350, 0x400)?;
    program(&g, 0, 2, CENTISECOND)?;
    let (n, seconds) = ticks(&g, 2, 200)?;
    plausible(env, n, seconds, 100.0, "NMIs")?;
    ensure_eq!(g.count(0, AT_PIC), 0, "interrupts of the PIC");
    g.write(0, APIC + 0x350, 0x1_0400)?;
    g.window(0)?;
    let before = g.count(0, 2);
    ticks(&g, 2, 50)?;
    ensure_eq!(g.count(0, 2), before, "NMIs, masked");
    Ok(())
}

/// VMs go while their timers tick.
fn vm_goes(env: &Env) -> Outcome {
    for round in 0..env.fewer(8) {
        let g = guest(env)?;
        // Not faster than the guest is where everything is slow: it would do nothing else.
        program(&g, 0, 2, (300 * env.slow).min(60_000) as u16)?;
        if round % 2 == 0 {
            ticks(&g, AT_PIC, 3 * u64::from(env.slow))?;
        }
        let Guest { vcpus, vm, .. } = g;
        if round % 4 < 2 {
            drop((vm, vcpus));
        } else {
            drop((vcpus, vm));
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    selftests::tap::main(
        "pit",
        tests![
            creation,
            refusals,
            state,
            programming,
            latches,
            counting,
            speaker,
            periodic,
            one_shot,
            reinjection,
            hpet,
            moves,
            line_zero,
            shortest,
            watchdog,
            vm_goes,
        ],
    )
}
