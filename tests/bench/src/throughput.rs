//! TCP and small UDP datagrams through two VM ports, with the programs and without.
use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsFd as _,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread::{self, sleep},
    time::Duration,
};

use anyhow::{Result, bail};
use dhcp_reclaim_agent::kernel::Hook;
use dhcp_reclaim_tests::{clock::now, fixture::BRIDGE, netns::NetNs, node::Node, report::Row};

use crate::{cost, lab, stats::median, sys};

const SECTION: &str = "cost: through two VM ports";
const WINDOW: Duration = Duration::from_millis(100);
const SETTLE: Duration = Duration::from_millis(20);
/// Each end of the traffic has one to itself: where they run is no part of the noise.
const SENDER_CPU: usize = 0;
const RECEIVER_CPU: usize = 1;
const FROM: Ipv4Addr = Ipv4Addr::new(10, 67, 0, 2);
const TO: Ipv4Addr = Ipv4Addr::new(10, 67, 0, 3);
const PORT: u16 = 7000;

pub fn rows(quick: bool) -> Result<Vec<Row>> {
    lab::sweep()?;
    let node = Node::new()?;
    let mut ends = Vec::new();
    for (port, ip) in [("vm1", FROM), ("vm2", TO)] {
        let end = NetNs::new()?;
        node.netns.ip(&format!(
            "link add {port} type veth peer name eth0 netns {}
             link set {port} master {BRIDGE} up",
            end.path()
        ))?;
        end.ip(&format!("addr add {ip}/24 dev eth0\nlink set eth0 up"))?;
        ends.push(end);
    }
    let [from, to] = &ends[..] else {
        bail!("two VMs");
    };
    let rounds = if quick { 15 } else { 81 };
    Ok(vec![
        measure("TCP", rounds, |stop, received| {
            tcp(from, to, stop, received)
        })?,
        measure("UDP, 64 bytes", rounds, |stop, received| {
            udp(from, to, stop, received)
        })?,
    ])
}

/// What is at the two ports in a window.
#[derive(Clone, Copy)]
enum There {
    Nothing,
    Programs,
    Empty,
    NothingAgain,
}

const ALL: [There; 4] = [
    There::Nothing,
    There::Programs,
    There::NothingAgain,
    There::Empty,
];

/// Traffic runs all the time, and the receiver never sleeps: what it costs to wake it is no part of what
/// is measured, and most of the noise. In each round every case has a window, in an order that rotates, so that
/// none always comes after the same other one.
fn measure(
    name: &str,
    rounds: usize,
    traffic: impl FnOnce(&AtomicBool, &AtomicU64) -> Result<()> + Send,
) -> Result<Row> {
    let mut kernel = cost::kernel(Hook::Tc)?;
    let ports = [cost::port("vm1")?, cost::port("vm2")?];
    let (stop, received) = (AtomicBool::new(false), AtomicU64::new(0));
    let window = || {
        // What was done to the ports is over, in the kernel's own threads too.
        sleep(SETTLE);
        let (begin, before) = (now(), received.load(Ordering::Relaxed));
        sleep(WINDOW);
        (received.load(Ordering::Relaxed) - before) as f64 / (now() - begin).as_secs_f64()
    };
    let empty = sys::empty_program(sys::Kind::Classifier)?;
    let mut one = |there: There| -> Result<f64> {
        let mut links = Vec::new();
        match there {
            There::Nothing | There::NothingAgain => {}
            There::Programs => {
                for port in &ports {
                    kernel.watch(port, 0, 0)?;
                }
            }
            There::Empty => {
                for port in &ports {
                    for place in [sys::Place::TcxIngress, sys::Place::TcxEgress] {
                        links.push(sys::attach(empty.as_fd(), port.ifindex, place, 0)?);
                    }
                }
            }
        }
        let rate = window();
        if matches!(there, There::Programs) {
            for port in &ports {
                kernel.unwatch(port.ifindex);
            }
        }
        Ok(rate)
    };
    let (ratios, of_empty, null, rate) = thread::scope(|scope| {
        let traffic = scope.spawn(|| traffic(&stop, &received));
        sleep(WINDOW);
        let (mut ratios, mut of_empty) = (Vec::new(), Vec::new());
        let (mut null, mut rates) = (Vec::new(), Vec::new());
        let mut run = || -> Result<()> {
            for round in 0..rounds {
                let mut order = ALL;
                order.rotate_left(round % ALL.len());
                if round / ALL.len() % 2 == 1 {
                    order.reverse();
                }
                let mut rate = [0.0; ALL.len()];
                for there in order {
                    rate[there as usize] = one(there)?;
                }
                let [nothing, programs, empty, again] = rate;
                let without = f64::midpoint(nothing, again);
                ratios.push(programs / without);
                of_empty.push(empty / without);
                null.push(again / nothing);
                rates.push(without);
            }
            Ok(())
        };
        let ran = run();
        stop.store(true, Ordering::Relaxed);
        match traffic.join() {
            Ok(done) => done?,
            Err(_) => bail!("the traffic panicked"),
        }
        ran?;
        let rate = median(&rates).value;
        Ok((median(&ratios), median(&of_empty), median(&null), rate))
    })?;
    Ok(Row::new(
        SECTION,
        format!("{name}: with the programs by without"),
        ratios.value,
        "",
    )
    .interval(ratios.interval)
    .beside("with empty programs by without", of_empty.value)
    .goal("at least 0.99", ratios.value >= 0.99)
    .note(format!(
        "empty programs [{:.3}, {:.3}]; null test {:.3} [{:.3}, {:.3}]; {:.3e} a second without",
        of_empty.interval[0],
        of_empty.interval[1],
        null.value,
        null.interval[0],
        null.interval[1],
        rate
    )))
}

fn tcp(from: &NetNs, to: &NetNs, stop: &AtomicBool, received: &AtomicU64) -> Result<()> {
    let listener = to.enter(|| Ok(TcpListener::bind((TO, PORT))?))?;
    let mut sender = from.enter(|| Ok(TcpStream::connect((TO, PORT))?))?;
    let (mut receiver, _) = listener.accept()?;
    receiver.set_nonblocking(true)?;
    // Where that cannot be, it goes where it likes.
    let _anywhere = sys::stay_on(RECEIVER_CPU);
    thread::scope(|scope| {
        scope.spawn(move || {
            let _anywhere = sys::stay_on(SENDER_CPU);
            let chunk = vec![0; 1 << 16];
            // It ends with the connection.
            while !stop.load(Ordering::Relaxed) && sender.write_all(&chunk).is_ok() {}
        });
        let mut buffer = vec![0; 1 << 18];
        loop {
            match receiver.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(length) => received.fetch_add(length as u64, Ordering::Relaxed),
                Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error.into()),
            };
        }
    })
}

fn udp(from: &NetNs, to: &NetNs, stop: &AtomicBool, received: &AtomicU64) -> Result<()> {
    let receiver = to.enter(|| Ok(UdpSocket::bind((TO, PORT))?))?;
    receiver.set_nonblocking(true)?;
    let sender = from.enter(|| Ok(UdpSocket::bind((FROM, PORT))?))?;
    sender.connect((TO, PORT))?;
    let _anywhere = sys::stay_on(RECEIVER_CPU);
    thread::scope(|scope| {
        scope.spawn(move || {
            let _anywhere = sys::stay_on(SENDER_CPU);
            while !stop.load(Ordering::Relaxed) {
                // Full buffers are what is measured.
                let _full = sender.send(&[0; 64]);
            }
        });
        let mut buffer = [0; 128];
        while !stop.load(Ordering::Relaxed) {
            if receiver.recv(&mut buffer).is_ok() {
                received.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(())
    })
}
