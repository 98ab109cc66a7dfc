//! `probe` and `release`: a VM is asked now, and the steps towards its release are taken early.

use std::{
    ffi::OsStr,
    io::{self, BufRead as _, IsTerminal as _, Write as _},
    net::Ipv4Addr,
    process::ExitCode,
};

use clap::builder::{PossibleValue, TypedValueParser};

use super::{EXIT_NOT_SO, Query, UsageError, print, table::Table, unexpected};
use crate::{
    control::{
        ProbeView, ReleaseResult, ReleaseView, Request, Response, Which, json_line, printable,
    },
    core::{Vlan, gates::Gate},
};

/// Ask a VM now whether it lives, and wait a second for its answer
///
/// As the agent asks: by a unicast ARP request out of the VM's own port, or into the bridge once the
/// port is gone; any frame of the VM is an answer. Exits 0 if it is alive, 4 if it is silent. For root
/// only.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    query: Query,
}

/// Give an address back now, if every gate agrees
///
/// The VM is asked at once, and without the usual pauses in between, for some seconds. Then every gate
/// is asked: if one holds, it is told which, and the exit code is 4. For root only.
#[derive(Debug, clap::Args)]
pub struct ReleaseArgs {
    #[command(flatten)]
    place: Place,
    /// Gates to override, for this once; who did it is written down
    #[arg(long, value_name = "GATE", value_delimiter = ',', value_parser = GateParser)]
    force: Vec<Gate>,
    /// Do not ask whether --force is meant
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    query: Query,
}

#[derive(Debug, clap::Args)]
struct Place {
    ip: Ipv4Addr,
    /// The bridge, where the address is known on several
    #[arg(long, value_name = "NAME")]
    bridge: Option<String>,
    /// The VLAN, where the address is known in several; 0 is none
    #[arg(long, value_name = "VLAN")]
    vlan: Option<Vlan>,
}

impl Place {
    fn which(&self) -> Which {
        Which {
            ip: self.ip,
            bridge: self.bridge.clone(),
            vlan: self.vlan,
        }
    }
}

pub fn probe(args: &Args) -> anyhow::Result<ExitCode> {
    let mut alive = false;
    let mut text = String::new();
    let request = Request::Probe(args.place.which());
    args.query.ask(&request, |answer| {
        let Response::Probed(view) = answer else {
            return Err(unexpected(&answer));
        };
        alive = view.alive;
        text = if args.query.json {
            json_line(&view)? + "\n"
        } else {
            probed(&view)
        };
        Ok(())
    })?;
    print(&text)?;
    Ok(code(alive))
}

pub fn release(args: &ReleaseArgs) -> anyhow::Result<ExitCode> {
    if !args.force.is_empty() && !args.yes && !is_meant(args)? {
        anyhow::bail!("nothing was done");
    }
    let mut done = false;
    let mut text = String::new();
    let request = Request::Release {
        which: args.place.which(),
        force: args.force.clone(),
    };
    let mut failed = false;
    args.query.ask(&request, |answer| {
        let Response::Release(view) = answer else {
            return Err(unexpected(&answer));
        };
        done = matches!(
            view.result,
            ReleaseResult::Released | ReleaseResult::WouldRelease
        );
        failed = view.result == ReleaseResult::Failed;
        text = if args.query.json {
            json_line(&view)? + "\n"
        } else {
            released(&view)
        };
        Ok(())
    })?;
    print(&text)?;
    if failed {
        return Ok(ExitCode::FAILURE);
    }
    Ok(code(done))
}

fn code(so: bool) -> ExitCode {
    if so {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(EXIT_NOT_SO)
    }
}

fn is_meant(args: &ReleaseArgs) -> anyhow::Result<bool> {
    if !io::stdin().is_terminal() {
        let message = "--force without --yes asks first, and there is no terminal to ask on";
        return Err(UsageError(message.to_owned()).into());
    }
    let gates: Vec<&str> = args.force.iter().map(|gate| gate.name()).collect();
    let mut stderr = io::stderr().lock();
    write!(
        stderr,
        "release {} overriding {}? If its VM lives, it loses its address. Type yes: ",
        args.place.ip,
        gates.join(", ")
    )?;
    stderr.flush()?;
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line)?;
    Ok(line.trim() == "yes")
}

fn probed(view: &ProbeView) -> String {
    let binding = &view.binding;
    let (ip, mac) = (binding.ip, binding.mac);
    let text = match (&view.seen_at, &view.seen_by) {
        (Some(at), Some(port)) => format!("{ip} ({mac}) is alive: seen {at:.3} by {port}\n"),
        _ => format!("{ip} ({mac}) is silent: no frame of it came, by any port\n"),
    };
    printable_lines(&text)
}

fn released(view: &ReleaseView) -> String {
    let binding = &view.binding;
    let ip = binding.ip;
    let server = super::table::or_dash(binding.server);
    let text = match view.result {
        ReleaseResult::Released => format!("{ip} is released: the RELEASE went to {server}\n"),
        ReleaseResult::WouldRelease => format!("{ip} would be released to {server}: dry run\n"),
        ReleaseResult::Vetoed => {
            format!("{ip} is not released: the kernel half heard its VM at the last moment\n")
        }
        ReleaseResult::Failed => format!("{ip} is not released: the RELEASE could not be sent\n"),
        ReleaseResult::Ended => format!("{ip} is not released: its lease has ended meanwhile\n"),
        ReleaseResult::Alive => match (&view.seen_at, &view.seen_by) {
            (Some(at), Some(port)) => {
                format!("{ip} is not released: its VM is alive, seen {at:.3} by {port}\n")
            }
            _ => format!("{ip} is not released: its VM is alive\n"),
        },
        ReleaseResult::Held => {
            let mut table = Table::new(&["GATE", "VERDICT", "WHY"]);
            let stops = view.gates.iter().filter(|gate| gate.verdict != "pass");
            for gate in stops {
                table.row([gate.gate.clone(), gate.verdict.clone(), gate.reason.clone()]);
            }
            return format!("{ip} is not released: a gate holds\n\n{}", table.text());
        }
    };
    printable_lines(&text)
}

/// One line each; what is within is made harmless.
fn printable_lines(text: &str) -> String {
    printable(text.trim_end()).into_owned() + "\n"
}

/// Gates by name; one that cannot be overridden says why.
#[derive(Clone, Copy, Debug)]
struct GateParser;

impl TypedValueParser for GateParser {
    type Value = Gate;

    fn parse_ref(
        &self,
        command: &clap::Command,
        _: Option<&clap::Arg>,
        value: &OsStr,
    ) -> Result<Gate, clap::Error> {
        let gate = Gate::ALL.into_iter().find(|gate| value == gate.name());
        let why = match gate.map(|gate| (gate, gate.unforceable())) {
            Some((gate, None)) => return Ok(gate),
            Some((gate, Some(why))) => format!("gate {gate} cannot be overridden: {why}"),
            None => {
                let names: Vec<&str> = forceable().map(Gate::name).collect();
                format!(
                    "no gate is called `{}`: these can be overridden: {}",
                    value.to_string_lossy(),
                    names.join(", ")
                )
            }
        };
        let error = clap::Error::raw(clap::error::ErrorKind::InvalidValue, why + "\n");
        Err(error.with_cmd(command))
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new(forceable().map(|gate| gate.name().into())))
    }
}

fn forceable() -> impl Iterator<Item = Gate> {
    Gate::ALL
        .into_iter()
        .filter(|gate| gate.unforceable().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{BindingView, GateView};

    fn held() -> ReleaseView {
        let gate = |gate: &str, verdict: &str| GateView {
            gate: gate.to_owned(),
            verdict: verdict.to_owned(),
            reason: "1 s of 2 s\u{1b}".to_owned(),
        };
        let binding: BindingView = serde_json::from_str(
            r#"{"ip":"10.0.0.7","mac":"02:00:00:00:00:01","client_id":null,"server":"10.0.0.1",
                "server_mac":null,"segment":"br0","vlan":null,"port":"vnet0","state":"gone",
                "lease_expires_at":null,"last_seen_at":null}"#,
        )
        .unwrap();
        ReleaseView {
            binding,
            result: ReleaseResult::Held,
            seen_at: None,
            seen_by: None,
            gates: vec![gate("dead", "pass"), gate("hold-down", "hold")],
        }
    }

    #[test]
    fn only_the_gates_that_hold_are_told() {
        assert_eq!(
            released(&held()),
            "10.0.0.7 is not released: a gate holds\n\nGATE       VERDICT  WHY\nhold-down  hold     \
             1 s of 2 s\\u{1b}\n"
        );
        let sent = ReleaseView {
            result: ReleaseResult::Released,
            ..held()
        };
        assert_eq!(
            released(&sent),
            "10.0.0.7 is released: the RELEASE went to 10.0.0.1\n"
        );
    }
}
