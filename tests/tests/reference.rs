//! What docs/configuration.md and docs/operations.md list is what the code has, no more and no less.
use std::{collections::BTreeSet, env, fs, path::Path};

use clap::{Arg, Command};
use dhcp_reclaim_agent::{
    cli,
    config::{Options, Settings},
    core::{self, NoticeKind, State, gates::Gate},
};
use dhcp_reclaim_ebpf::abi::Counter;
use serde::{Deserialize, de};

/// Set to write the document instead of comparing it.
const WRITE: &str = "DHCP_RECLAIM_WRITE_DOCS";
const BEGIN: &str = "<!-- made from the code, see tests/tests/reference.rs -->\n";
const END: &str = "<!-- end of what is made -->\n";

fn document(name: &str) -> String {
    fs::read_to_string(path(name)).unwrap_or_else(|error| panic!("docs/{name}: {error}"))
}

fn path(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../docs")
        .join(name)
}

fn run() -> Command {
    let command = cli::command();
    command.find_subcommand("run").unwrap().clone()
}

fn load(line: &str) -> Result<Settings, String> {
    let flags = Options {
        bridge: vec!["br0".to_owned()],
        ..Options::default()
    };
    Settings::parse(flags, Path::new("test.toml"), line).map_err(|error| error.to_string())
}

/// Whether the file of `--config` may say it too.
fn is_key(arg: &Arg) -> bool {
    let name = arg.get_long().unwrap();
    !load(&format!("{name} = []\n")).is_err_and(|error| error.contains("unknown key"))
}

/// The help's first paragraph, its default, and what the rest of it adds.
fn help(arg: &Arg) -> (String, Option<String>, String) {
    let short = arg.get_help().unwrap().to_string();
    let long = arg.get_long_help().map(ToString::to_string);
    let more = long
        .and_then(|long| {
            long.split_once("\n\n")
                .map(|(_, more)| more.replace('\n', " "))
        })
        .unwrap_or_default();
    let given = arg.get_default_values().first();
    match short.split_once(" [default: ") {
        None => {
            let default = given.map(|value| value.to_string_lossy().into_owned());
            (short, default, more)
        }
        Some((text, default)) => {
            let default = default.trim_end_matches(']').to_owned();
            (text.to_owned(), Some(default), more)
        }
    }
}

fn table(args: &[&Arg], name: impl Fn(&str) -> String) -> String {
    let mut text = "| setting | default | |\n|---|---|---|\n".to_owned();
    for arg in args {
        let (first, default, more) = help(arg);
        let code = |text: &str| match text.contains(' ') {
            true => text.to_owned(),
            false => format!("`{text}`"),
        };
        let default = default.as_deref().map(code).unwrap_or_default();
        let choices: Vec<_> = arg
            .get_possible_values()
            .iter()
            .filter(|_| !arg.is_hide_possible_values_set())
            .map(|value| format!("`{}`", value.get_name()))
            .collect();
        let choices = match choices.is_empty() {
            true => String::new(),
            false => format!(" ({})", choices.join(", ")),
        };
        let more = match more.is_empty() {
            true => String::new(),
            false => format!(". {}", more.trim_end_matches('.')),
        };
        let what = format!("{first}{choices}{more}").replace('|', "\\|");
        text.push_str(&format!(
            "| {} | {default} | {what} |\n",
            name(arg.get_long().unwrap())
        ));
    }
    text
}

fn reference() -> String {
    let run = run();
    let args: Vec<_> = run
        .get_arguments()
        .filter(|arg| {
            arg.get_long()
                .is_some_and(|name| name != "help" && name != "version")
        })
        .collect();
    let settings = load("").unwrap();
    let at_start = settings.at_start(&settings).map(|(key, _)| key);
    let mut headings = vec!["What is watched, and how"];
    for arg in &args {
        let heading = arg.get_help_heading().unwrap_or(headings[0]);
        if !headings.contains(&heading) {
            headings.push(heading);
        }
    }
    let mut text = String::new();
    for heading in &headings {
        let here = |arg: &&&Arg| arg.get_help_heading().unwrap_or(headings[0]) == *heading;
        let keys: Vec<_> = args
            .iter()
            .filter(here)
            .copied()
            .filter(|arg| is_key(arg))
            .collect();
        if !keys.is_empty() {
            let keys = table(&keys, |name| match at_start.contains(&name) {
                true => format!("`{name}` †"),
                false => format!("`{name}`"),
            });
            text.push_str(&format!("\n## {heading}\n\n{keys}"));
        }
    }
    let flags: Vec<_> = args.iter().copied().filter(|arg| !is_key(arg)).collect();
    let flags = table(&flags, |name| format!("`--{name}`"));
    text.push_str(&format!(
        "\n## Flags that are no keys of the file\n\n{flags}\n"
    ));
    text
}

#[test]
fn the_configuration_reference_is_what_the_code_says() {
    let text = document("configuration.md");
    let (before, rest) = text.split_once(BEGIN).expect(BEGIN);
    let (made, after) = rest.split_once(END).expect(END);
    let expected = reference();
    if env::var_os(WRITE).is_some() {
        let text = [before, BEGIN, &expected, END, after].concat();
        fs::write(path("configuration.md"), text).unwrap();
        return;
    }
    assert!(
        made == expected,
        "docs/configuration.md is out of date; mend it by\n\
         {WRITE}=1 cargo test -p dhcp-reclaim-tests --test reference\nexpected:{expected}"
    );
}

/// The help says its defaults in words; this is what keeps them true.
#[test]
fn every_default_is_the_one_that_is_told() {
    let default = load("").unwrap();
    let mut tried = 0;
    for arg in run().get_arguments().filter(|arg| arg.get_long().is_some()) {
        let (_, Some(told), _) = (match arg.get_help() {
            Some(_) => help(arg),
            None => continue,
        }) else {
            continue;
        };
        let name = arg.get_long().unwrap();
        // Flags of their own, and what is no value.
        if !is_key(arg) || told.contains(' ') {
            continue;
        }
        let loaded = load(&format!("{name} = \"{told}\"\n"))
            .or_else(|_| load(&format!("{name} = {told}\n")))
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(loaded, default, "{name} = {told} is not the default");
        tried += 1;
    }
    assert!(tried > 10, "{tried} have a default");
}

/// The names of an enum's variants, as serde was told them by the derive.
fn variants<'de, T: Deserialize<'de>>() -> &'static [&'static str] {
    struct Names(&'static [&'static str]);

    impl<'de> de::Deserializer<'de> for &mut Names {
        type Error = de::value::Error;

        fn deserialize_any<V: de::Visitor<'de>>(self, _: V) -> Result<V::Value, Self::Error> {
            Err(de::Error::custom("no enum"))
        }

        fn deserialize_enum<V: de::Visitor<'de>>(
            self,
            _: &'static str,
            variants: &'static [&'static str],
            visitor: V,
        ) -> Result<V::Value, Self::Error> {
            self.0 = variants;
            self.deserialize_any(visitor)
        }

        serde::forward_to_deserialize_any! {
            bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit
            unit_struct newtype_struct seq tuple tuple_struct map struct identifier ignored_any
        }
    }

    let mut names = Names(&[]);
    assert!(T::deserialize(&mut names).is_err());
    assert!(!names.0.is_empty());
    names.0
}

/// The first cells of the table below a heading, without their code marks.
fn listed(name: &str, heading: &str) -> BTreeSet<String> {
    let document = document(name);
    let (_, section) = document
        .split_once(&format!("\n## {heading}\n"))
        .unwrap_or_else(|| panic!("no section {heading:?} in {name}"));
    let section = section.split("\n## ").next().unwrap_or_default();
    let rows = section.lines().skip_while(|line| !line.starts_with("|---"));
    let cells = rows.filter_map(|line| line.strip_prefix("| ")?.split(" | ").next());
    // Several names may share what is said of them.
    cells
        .flat_map(|cell| cell.split(", "))
        .map(|name| name.trim_matches('`').to_owned())
        .collect()
}

fn ensure_listed(name: &str, heading: &str, expected: impl IntoIterator<Item = String>) {
    let listed = listed(name, heading);
    let expected: BTreeSet<_> = expected.into_iter().collect();
    let missing: Vec<_> = expected.difference(&listed).collect();
    let unknown: Vec<_> = listed.difference(&expected).collect();
    assert!(
        missing.is_empty(),
        "docs/{name}, {heading}: not described: {missing:?}"
    );
    assert!(
        unknown.is_empty(),
        "docs/{name}, {heading}: not in the code: {unknown:?}"
    );
}

fn owned(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn every_event_is_described() {
    ensure_listed("operations.md", "Events", owned(variants::<NoticeKind>()));
}

#[test]
fn every_state_is_described() {
    let imported = "imported".to_owned();
    let states = owned(variants::<State>()).into_iter().chain([imported]);
    ensure_listed("operations.md", "States", states);
}

#[test]
fn every_gate_is_described() {
    ensure_listed(
        "safety.md",
        "Gates",
        Gate::ALL.map(|gate| gate.name().to_owned()),
    );
}

#[test]
fn every_command_is_described() {
    let table = document("commands.md");
    let table: Vec<_> = table
        .lines()
        .filter(|line| line.starts_with("| `"))
        .collect();
    let command = cli::command();
    let names = command
        .get_subcommands()
        .filter(|command| !command.is_hide_set());
    for name in names.map(Command::get_name) {
        let here = |line: &&&str| {
            let cell = line.split(" | ").next().unwrap_or_default();
            cell.split(['`', ' ', ',']).any(|word| word == name)
        };
        assert!(
            table.iter().any(|line| here(&line)),
            "docs/commands.md: {name} is missing"
        );
    }
}

#[test]
fn every_exit_code_is_described() {
    let help = cli::command().get_after_help().unwrap().to_string();
    let (_, codes) = help.split_once("Exit codes:\n").unwrap();
    let codes = codes.lines().map_while(|line| {
        let (code, _) = line.trim().split_once(' ')?;
        code.parse::<u8>().ok().map(|code| code.to_string())
    });
    let codes: Vec<_> = codes.collect();
    assert!(codes.len() >= 4, "{codes:?}");
    ensure_listed("operations.md", "Exit codes", codes.clone());
    ensure_listed("commands.md", "Exit codes", codes);
}

/// Those of the loop are an agent's own answer: see documents.rs.
#[test]
fn every_counter_of_the_kernel_half_and_the_core_is_described() {
    let listed = listed("operations.md", "Counters");
    let kernel = Counter::ALL.map(|counter| format!("kernel.{}", counter.name()));
    let core = core::counters::COUNTERS
        .iter()
        .map(|name| format!("core.{name}"));
    let expected: BTreeSet<_> = kernel.into_iter().chain(core).collect();
    let missing: Vec<_> = expected.difference(&listed).collect();
    assert!(
        missing.is_empty(),
        "docs/operations.md does not describe {missing:?}"
    );
    let unknown: Vec<_> = listed
        .difference(&expected)
        .filter(|name| !name.starts_with("agent."))
        .collect();
    assert!(
        unknown.is_empty(),
        "docs/operations.md describes {unknown:?}, which is not counted"
    );
}

/// By the name's own file, so that one that is forgotten there is found before it panics.
#[test]
fn the_core_counts_nothing_that_is_not_listed() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../dhcp-reclaim-agent/src/core");
    let mut files = vec![folder.join("engine.rs")];
    let engine = fs::read_dir(folder.join("engine")).unwrap();
    files.extend(engine.map(|entry| entry.unwrap().path()));
    let mut found = 0;
    for file in files {
        let source = fs::read_to_string(file).unwrap();
        for call in source.split("self.add(").skip(1) {
            let Some(name) = call.trim_start().strip_prefix('"') else {
                continue;
            };
            let name = name.split('"').next().unwrap();
            assert!(core::counters::COUNTERS.contains(&name), "{name}");
            found += 1;
        }
    }
    assert!(found > 30, "{found} counters found in the source");
}
