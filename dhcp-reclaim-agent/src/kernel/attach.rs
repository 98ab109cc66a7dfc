//! Programs on ports: tcx first in the order, else clsact; or XDP. Links are pinned, so that they
//! outlive the agent; a later one takes them over and swaps the program without a gap.

use std::{
    collections::BTreeMap,
    fs, io,
    mem::ManuallyDrop,
    path::{Path, PathBuf},
};

use super::{
    Hook, KernelError, filters, interface_name,
    load::{PinDir, path_error, program},
};
use crate::core::{IfIndex, Port, Role};
use crate::errors::chain;
use aya::{
    Ebpf,
    programs::{
        LinkOrder, ProgramError, SchedClassifier, TcAttachType, Xdp, XdpMode,
        links::{FdLink, PinnedLink},
        tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions},
        xdp::XdpLink,
    },
};

/// How the programs came to sit on a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum AttachedHook {
    Tcx,
    /// Others may take it away (Calico, OVS), and a crash leaves the filter behind: watch again.
    Clsact,
    XdpNative,
    XdpGeneric,
}

impl AttachedHook {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
            Self::XdpNative => "xdp-native",
            Self::XdpGeneric => "xdp-generic",
        }
    }
}

#[derive(Default)]
pub(super) struct Attachments {
    ports: BTreeMap<IfIndex, Vec<Held>>,
    emit: Vec<Held>,
}

/// One program on one port. Dropped, it stays where it is.
struct Held {
    hook: AttachedHook,
    link: Link,
}

enum Link {
    Pinned {
        link: PinnedLink,
        path: PathBuf,
    },
    /// Not pinned: goes with the process.
    Tcx(FdLink),
    /// A filter cannot be pinned, but outlives the process as it is.
    Clsact {
        link: ManuallyDrop<SchedClassifierLink>,
        way: TcAttachType,
        name: &'static str,
        /// Its program's number in the kernel.
        program: u32,
    },
    /// XDP by netlink, before Linux 5.9: likewise.
    XdpNetlink(ManuallyDrop<XdpLink>),
}

impl Held {
    /// Takes the program off. A port that is gone took it along: that is no error.
    fn detach(self) {
        match self.link {
            Link::Pinned { link, path } => {
                let _ = fs::remove_file(path);
                drop(link);
            }
            Link::Tcx(link) => drop(link),
            Link::Clsact { link, .. } => drop(ManuallyDrop::into_inner(link)),
            Link::XdpNetlink(link) => drop(ManuallyDrop::into_inner(link)),
        }
    }
}

impl Attachments {
    pub(super) fn attach(
        &mut self,
        ebpf: &mut Ebpf,
        pins: &PinDir,
        hook: Hook,
        port: &Port,
    ) -> Result<AttachedHook, KernelError> {
        // What sits there stays, until its successor does.
        let before = self.ports.remove(&port.ifindex).unwrap_or_default();
        let held = match hook {
            // Of tcx the pin is taken over, of clsact the filters are replaced.
            Hook::Tc | Hook::Clsact => attach_tc(ebpf, pins, hook, port)?,
            Hook::Xdp => vec![attach_xdp(ebpf, pins, port.ifindex, before)?],
        };
        // The worst of them: what is said of the port must hold for both ways.
        let hook = held.iter().map(|held| held.hook).max();
        self.ports.insert(port.ifindex, held);
        hook.ok_or(KernelError::Object("programs"))
    }

    pub(super) fn attach_emit(
        &mut self,
        ebpf: &mut Ebpf,
        hook: Hook,
        ifindex: IfIndex,
    ) -> Result<AttachedHook, KernelError> {
        for held in self.emit.drain(..) {
            held.detach();
        }
        // Not pinned: the private link is the agent's own, and goes with it.
        let hook = if hook == Hook::Xdp { Hook::Tc } else { hook };
        let held = attach_classifier(ebpf, "emit", ifindex, TcAttachType::Egress, hook, None)?;
        let hook = held.hook;
        self.emit.push(held);
        Ok(hook)
    }

    pub(super) fn has(&self, ifindex: IfIndex) -> bool {
        self.ports.contains_key(&ifindex)
    }

    /// Whether nobody took a program of the port away: from a clsact that is possible.
    pub(super) fn in_place(&self, ifindex: IfIndex) -> bool {
        let mut held = self.ports.get(&ifindex).into_iter().flatten();
        held.all(|held| match &held.link {
            Link::Clsact {
                way, name, program, ..
            } => filters::with_name(ifindex, *way, name)
                .is_ok_and(|filters| filters.iter().any(|filter| filter.program == *program)),
            Link::Pinned { .. } | Link::Tcx(_) | Link::XdpNetlink(_) => true,
        })
    }

    pub(super) fn detach(&mut self, ifindex: IfIndex) {
        for held in self.ports.remove(&ifindex).unwrap_or_default() {
            held.detach();
        }
    }

    pub(super) fn detach_all(&mut self) {
        let ports = std::mem::take(&mut self.ports);
        for held in ports.into_values().flatten().chain(self.emit.drain(..)) {
            held.detach();
        }
    }

    /// Removes the pinned links of ports that are not watched.
    pub(super) fn remove_stale(&self, pins: &PinDir) -> Result<Vec<IfIndex>, KernelError> {
        let links = pins.links();
        let mut stale = Vec::new();
        let entries = fs::read_dir(&links).map_err(|source| path_error(&links, source))?;
        for entry in entries.flatten() {
            let name = entry.file_name();
            let owner = name
                .to_str()
                .and_then(|name| name.split_once('-')?.0.parse().ok());
            if owner.is_some_and(|owner| self.has(owner)) {
                continue;
            }
            let path = entry.path();
            fs::remove_file(&path).map_err(|source| path_error(&path, source))?;
            stale.extend(owner);
        }
        Ok(stale)
    }
}

/// Takes off what an agent before us left on a port's clsact, of which there is no pin; whether
/// there was something.
pub(super) fn remove_filters(ifindex: IfIndex) -> bool {
    // A port that is gone took them along.
    let Some(interface) = interface_name(ifindex) else {
        return false;
    };
    WAYS.map(|(program, way, _)| tc::qdisc_detach_program(&interface, way, program).is_ok())
        .contains(&true)
}

/// The programs of a port, where they sit, and what their pins are called.
const WAYS: [(&str, TcAttachType, &str); 2] = [
    ("vm_ingress", TcAttachType::Ingress, "ingress"),
    ("vm_egress", TcAttachType::Egress, "egress"),
];

fn attach_tc(
    ebpf: &mut Ebpf,
    pins: &PinDir,
    hook: Hook,
    port: &Port,
) -> Result<Vec<Held>, KernelError> {
    // What goes out elsewhere answers no VM of ours.
    let ways = match port.role {
        Role::Vm => &WAYS[..],
        Role::Uplink | Role::Aside => &WAYS[..1],
    };
    let mut done = Vec::new();
    for &(name, way, pin) in ways {
        let pin = pins.links().join(format!("{}-{pin}", port.ifindex));
        match attach_classifier(ebpf, name, port.ifindex, way, hook, Some(&pin)) {
            Ok(held) => done.push(held),
            Err(error) => {
                // One way alone would let us believe that nobody answers.
                done.into_iter().for_each(Held::detach);
                remove_filters(port.ifindex);
                return Err(error);
            }
        }
    }
    Ok(done)
}

fn attach_classifier(
    ebpf: &mut Ebpf,
    name: &'static str,
    ifindex: IfIndex,
    way: TcAttachType,
    hook: Hook,
    pin: Option<&Path>,
) -> Result<Held, KernelError> {
    let interface = interface(ifindex)?;
    let program = program::<SchedClassifier>(ebpf, name)?;
    // What an earlier agent left on clsact, or we ourselves. It goes once its successor is there: a
    // frame between them is heard twice, which is a repetition, and not missed.
    let before = filters::with_name(ifindex, way, name).unwrap_or_else(|_| {
        // Not there: so much the better.
        let _ = tc::qdisc_detach_program(&interface, way, name);
        Vec::new()
    });
    let held = attach_by(program, name, ifindex, &interface, (way, hook, pin))?;
    for filter in before {
        filter.remove(&interface, way);
    }
    Ok(held)
}

fn attach_by(
    program: &mut SchedClassifier,
    name: &'static str,
    ifindex: IfIndex,
    interface: &str,
    (way, hook, pin): (TcAttachType, Hook, Option<&Path>),
) -> Result<Held, KernelError> {
    let tcx = if hook == Hook::Clsact {
        Err("not wanted".to_owned())
    } else {
        attach_tcx(program, interface, way, pin).map_err(|error| chain(&error))
    };
    let tcx_error = match tcx {
        Ok(held) => return Ok(held),
        Err(error) => error,
    };
    // The kernel's version says little: try.
    match attach_clsact(program, name, interface, way) {
        Ok(held) => {
            // What sat on tcx before goes with its pin.
            if let Some(pin) = pin {
                let _ = fs::remove_file(pin);
            }
            Ok(held)
        }
        Err(_) if interface_name(ifindex).is_none() => Err(KernelError::PortGone { ifindex }),
        Err(error) => Err(KernelError::Attach {
            program: name,
            name: interface.to_owned(),
            hooks: format!("tcx: {tcx_error}; clsact: {}", chain(&error)),
        }),
    }
}

fn attach_tcx(
    program: &mut SchedClassifier,
    interface: &str,
    way: TcAttachType,
    pin: Option<&Path>,
) -> Result<Held, ProgramError> {
    let hook = AttachedHook::Tcx;
    if let Some(path) = pin
        && let Ok(pinned) = PinnedLink::from_pin(path)
    {
        // Fails if the port that it was for is gone, or if it is no such link.
        let taken = SchedClassifierLink::try_from(FdLink::from(pinned))
            .map_err(other)
            .and_then(|link| program.attach_to_link(link))
            .and_then(|id| program.take_link(id));
        match taken {
            Ok(link) => drop(link),
            Err(_) => {
                let _ = fs::remove_file(path);
            }
        }
        if let Ok(link) = PinnedLink::from_pin(path) {
            return Ok(Held {
                hook,
                link: Link::Pinned {
                    link,
                    path: path.to_owned(),
                },
            });
        }
    }
    // First: behind a neighbour that ends the chain (Cilium) nothing would be seen.
    let order = TcAttachOptions::TcxOrder(LinkOrder::first());
    let id = program.attach_with_options(interface, way, order)?;
    let link: FdLink = program.take_link(id)?.try_into().map_err(other)?;
    let link = match pin {
        None => Link::Tcx(link),
        Some(path) => match link.pin(path) {
            Ok(link) => Link::Pinned {
                link,
                path: path.to_owned(),
            },
            Err(error) => return Err(other(error)),
        },
    };
    Ok(Held { hook, link })
}

fn attach_clsact(
    program: &mut SchedClassifier,
    name: &'static str,
    interface: &str,
    way: TcAttachType,
) -> Result<Held, ProgramError> {
    let number = program.info()?.id();
    // It may be there already; if not, attaching says why.
    let _ = tc::qdisc_add_clsact(interface);
    let first = NlOptions {
        priority: 1,
        ..NlOptions::default()
    };
    let id = program.attach_with_options(interface, way, TcAttachOptions::Netlink(first))?;
    let link = program.take_link(id)?;
    Ok(Held {
        hook: AttachedHook::Clsact,
        link: Link::Clsact {
            link: ManuallyDrop::new(link),
            way,
            name,
            program: number,
        },
    })
}

fn attach_xdp(
    ebpf: &mut Ebpf,
    pins: &PinDir,
    ifindex: IfIndex,
    before: Vec<Held>,
) -> Result<Held, KernelError> {
    let interface = interface(ifindex)?;
    let program = program::<Xdp>(ebpf, "xdp_ingress")?;
    let mut failures = Vec::new();
    // The mode is in the name of the pin: the link does not tell.
    let modes = [
        (XdpMode::Driver, AttachedHook::XdpNative, "native"),
        (XdpMode::Skb, AttachedHook::XdpGeneric, "generic"),
    ];
    for (_, hook, name) in modes {
        let path = pins.links().join(format!("{ifindex}-{name}"));
        let Ok(pinned) = PinnedLink::from_pin(&path) else {
            continue;
        };
        let taken = XdpLink::try_from(FdLink::from(pinned))
            .map_err(other)
            .and_then(|link| program.attach_to_link(link))
            .and_then(|id| program.take_link(id));
        match (taken, PinnedLink::from_pin(&path)) {
            (Ok(_), Ok(link)) => {
                return Ok(Held {
                    hook,
                    link: Link::Pinned { link, path },
                });
            }
            _ => {
                let _ = fs::remove_file(path);
            }
        }
    }
    before.into_iter().for_each(Held::detach);
    for (mode, hook, name) in modes {
        let id = match program.attach_to_if_index(ifindex, mode) {
            Ok(id) => id,
            Err(error) => {
                failures.push(format!("{}: {}", hook.name(), chain(&error)));
                continue;
            }
        };
        let Ok(link) = program.take_link(id) else {
            continue;
        };
        let path = pins.links().join(format!("{ifindex}-{name}"));
        let link = match FdLink::try_from(link) {
            Ok(link) => match link.pin(&path) {
                Ok(link) => Link::Pinned { link, path },
                Err(error) => {
                    failures.push(format!("{}: {}", hook.name(), chain(&error)));
                    continue;
                }
            },
            // The link is detached with the failed conversion.
            Err(_) => match program.attach_to_if_index(ifindex, mode) {
                Ok(id) => match program.take_link(id) {
                    Ok(link) => Link::XdpNetlink(ManuallyDrop::new(link)),
                    Err(_) => continue,
                },
                Err(error) => {
                    failures.push(format!("{}: {}", hook.name(), chain(&error)));
                    continue;
                }
            },
        };
        return Ok(Held { hook, link });
    }
    if interface_name(ifindex).is_none() {
        return Err(KernelError::PortGone { ifindex });
    }
    Err(KernelError::Attach {
        program: "xdp_ingress",
        name: interface,
        hooks: failures.join("; "),
    })
}

/// aya asks for names; ports are renamed while they come up.
fn interface(ifindex: IfIndex) -> Result<String, KernelError> {
    interface_name(ifindex).ok_or(KernelError::PortGone { ifindex })
}

/// aya's link errors have no place among its program errors.
fn other(error: impl std::error::Error + Send + Sync + 'static) -> ProgramError {
    ProgramError::IOError(io::Error::other(error))
}
