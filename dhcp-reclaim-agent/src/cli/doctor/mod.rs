//! `doctor`: whether an agent can work here, and what to mend. It needs none, and changes nothing.

mod files;
mod host;
mod links;
mod netfilter;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde::Serialize;

use super::{print, table::wrapped, terminal::Style};
use crate::{
    config::{Options, Settings},
    control::{json_line, printable},
};

/// Where the packages put the configuration.
const CONFIG: &str = "/etc/dhcp-reclaim/dhcp-reclaim.toml";

/// Look whether the agent can work here, and say what to mend
///
/// Takes the settings that `run` takes; without a bridge it looks at all that are here. It changes
/// nothing, and no agent needs to run. Exits 1 if anything fails; warnings are told, and no failure.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// TOML file with settings [default: that of the packages, if it is there]
    #[arg(long, value_name = "PATH")]
    config: Option<PathBuf>,
    /// Print JSON: an object a line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    options: Options,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Health {
    Ok,
    Warn,
    Fail,
}

/// What one look came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Finding {
    check: &'static str,
    health: Health,
    text: String,
    /// What to type, or to do.
    mend: Option<String>,
}

/// All findings, in the order of the looks.
#[derive(Debug, Default)]
struct Chart(Vec<Finding>);

impl Chart {
    fn ok(&mut self, check: &'static str, text: impl Into<String>) {
        self.0.push(Finding {
            check,
            health: Health::Ok,
            text: text.into(),
            mend: None,
        });
    }

    fn warn(&mut self, check: &'static str, text: impl Into<String>, mend: impl Into<String>) {
        self.0.push(Finding {
            check,
            health: Health::Warn,
            text: text.into(),
            mend: Some(mend.into()),
        });
    }

    fn fail(&mut self, check: &'static str, text: impl Into<String>, mend: impl Into<String>) {
        self.0.push(Finding {
            check,
            health: Health::Fail,
            text: text.into(),
            mend: Some(mend.into()),
        });
    }

    fn count(&self, health: Health) -> usize {
        self.0.iter().filter(|it| it.health == health).count()
    }
}

pub fn main(args: Args) -> anyhow::Result<ExitCode> {
    let json = args.json;
    let mut chart = Chart::default();
    let settings = settings(args, &mut chart);
    host::look(&settings, &mut chart);
    files::look(&settings, &mut chart);
    links::look(&settings, &mut chart);
    let text = if json {
        let lines = chart
            .0
            .iter()
            .map(|it| json_line(it).map(|line| line + "\n"));
        lines.collect::<Result<String, _>>()?
    } else {
        for_people(&chart, Style::of_stdout())
    };
    print(&text)?;
    Ok(match chart.count(Health::Fail) {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

/// As `run` would have them; where they are wrong, what can still be looked at.
fn settings(args: Args, chart: &mut Chart) -> Settings {
    let packaged = Path::new(CONFIG);
    let config = args
        .config
        .or_else(|| packaged.exists().then(|| packaged.to_owned()));
    let named = !args.options.bridge.is_empty();
    let error = match Settings::load(args.options.clone(), config.as_deref()) {
        Ok(settings) => {
            let from = config.map_or("flags".to_owned(), |path| path.display().to_string());
            chart.ok(
                "configuration",
                format!("{from}: every setting makes sense"),
            );
            return settings;
        }
        Err(error) => error,
    };
    let bridges = if named {
        args.options.bridge.clone()
    } else {
        links::bridges()
    };
    if config.is_none() && !named {
        // Whether there is one is looked at later.
        let text = "no bridge is named: looking at all that are here, as with";
        let flags: Vec<String> = bridges
            .iter()
            .map(|name| format!("--bridge {name}"))
            .collect();
        chart.ok("configuration", format!("{text} {}", flags.join(" ")));
    } else {
        let text = crate::errors::chain(&error).to_string();
        let mend = match &config {
            Some(path) => format!("mend {}, then: dhcp-reclaim doctor", path.display()),
            None => "dhcp-reclaim run --help".to_owned(),
        };
        chart.fail("configuration", text, mend);
    }
    let whole = Options {
        bridge: bridges.clone(),
        ..args.options
    };
    let fallback = Settings {
        bridges,
        ..Settings::default()
    };
    Settings::load(whole, None).unwrap_or(fallback)
}

fn for_people(chart: &Chart, style: Style) -> String {
    let mut text = String::new();
    for finding in &chart.0 {
        let (word, painted) = match finding.health {
            Health::Ok => ("ok", style.green("ok")),
            Health::Warn => ("warn", style.yellow("warn")),
            Health::Fail => ("FAIL", style.red("FAIL")),
        };
        let head = format!("{word:<5} {:<14} ", finding.check);
        let body = wrapped(&printable(&finding.text), head.len());
        text.push_str(&head.replacen(word, &painted, 1));
        text.push_str(&body);
        text.push('\n');
        if let Some(mend) = &finding.mend {
            // Never broken: it is there to be copied.
            text.push_str(&format!("{:>20} {}\n", "mend:", printable(mend)));
        }
    }
    let (warnings, failures) = (chart.count(Health::Warn), chart.count(Health::Fail));
    text.push_str(&match (failures, warnings) {
        (0, 0) => "\nnothing to mend\n".to_owned(),
        (0, warnings) => format!("\nan agent can work here; warnings: {warnings}\n"),
        (failures, warnings) => format!("\nfailures: {failures}, warnings: {warnings}\n"),
    });
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_finding_has_its_line_and_its_mend() {
        let mut chart = Chart::default();
        chart.ok("kernel", "Linux 6.18");
        chart.fail(
            "bpffs",
            "/sys/fs/bpf is no BPF file system\u{1b}[2J, and where there is none nothing outlives the agent",
            "mount -t bpf bpf /sys/fs/bpf",
        );
        assert_eq!(
            for_people(&chart, Style::PLAIN),
            "\
ok    kernel         Linux 6.18
FAIL  bpffs          /sys/fs/bpf is no BPF file system\\u{1b}[2J, and where there
                     is none nothing outlives the agent
               mend: mount -t bpf bpf /sys/fs/bpf

failures: 1, warnings: 0
"
        );
    }
}
