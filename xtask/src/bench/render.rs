//! Rows as lines for a terminal, and docs/benchmarks.md.
use std::fmt::Write as _;

use anyhow::{Result, ensure};
use dhcp_reclaim_tests::report::{Report, Row};

/// The text around the tables; a line `@NAME` becomes all tables whose section is, or begins with,
/// that name.
const TEMPLATE: &str = include_str!("benchmarks.md");

pub fn line(row: &Row) -> String {
    let mut text = format!("{:<66} {:>11}", row.name, figure(row));
    if let Some(neighbour) = &row.neighbour {
        let _infallible = write!(text, "   {}: {}", neighbour.name, number(neighbour.value),);
        if let Some(ratio) = neighbour.ratio {
            let _infallible = write!(text, " ({}x)", number(ratio));
        }
    }
    if let Some(goal) = &row.goal {
        let verdict = if goal.met { "met" } else { "MISSED" };
        let _infallible = write!(text, "   [{}: {verdict}]", goal.text);
    }
    if !row.note.is_empty() {
        let _infallible = write!(text, "\n    {}", row.note);
    }
    text
}

pub fn summary(report: &Report) -> String {
    let goals: Vec<_> = report
        .rows
        .iter()
        .filter_map(|row| row.goal.as_ref())
        .collect();
    let met = goals.iter().filter(|goal| goal.met).count();
    let quick = match report.quick {
        true => ", by a `--quick` run, which is no more than a hint",
        false => "",
    };
    format!(
        "{} rows in {} s{quick}; {met} of {} goals met",
        report.rows.len(),
        report.seconds,
        goals.len()
    )
}

pub fn docs(report: &Report) -> Result<String> {
    let mut text = String::new();
    let mut shown = 0;
    for line in TEMPLATE.lines() {
        let Some(name) = line.strip_prefix('@') else {
            text.push_str(line);
            text.push('\n');
            continue;
        };
        if name == "machine" {
            let machine = &report.machine;
            let _infallible = writeln!(
                text,
                "{}, {} processors, Linux {}, on {}; load before it: {}. {}.",
                machine.cpu,
                machine.cpus,
                machine.kernel,
                machine.date,
                machine.load,
                summary(report)
            );
            continue;
        }
        let rows = report.rows.iter().filter(|row| {
            let rest = row.section.strip_prefix(name);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(':'))
        });
        let rows: Vec<&Row> = rows.collect();
        shown += rows.len();
        text.push_str(&tables(&rows));
    }
    ensure!(
        shown == report.rows.len(),
        "{} of {} rows have a place in the text",
        shown,
        report.rows.len()
    );
    Ok(text)
}

fn tables(rows: &[&Row]) -> String {
    let mut text = String::new();
    for (i, row) in rows.iter().enumerate() {
        if i == 0 || rows[i - 1].section != row.section {
            if i != 0 {
                text.push('\n');
            }
            let title = row.section.split_once(": ").map_or("", |(_, title)| title);
            let _infallible = writeln!(
                text,
                "| {title} | | beside it | ratio | goal |\n|---|---:|---|---:|---|"
            );
        }
        let (beside, ratio) = row
            .neighbour
            .as_ref()
            .map_or_else(Default::default, |this| {
                (
                    format!("{}: {}", this.name, number(this.value)),
                    this.ratio.map(number).unwrap_or_default(),
                )
            });
        let goal = row.goal.as_ref().map_or_else(String::new, |goal| {
            let verdict = if goal.met { "met" } else { "**missed**" };
            format!("{}: {verdict}", goal.text)
        });
        let note = match row.note.is_empty() {
            true => String::new(),
            false => format!(". {}", row.note),
        };
        let cell = format!("{}{note}", row.name).replace('|', "\\|");
        let _infallible = writeln!(
            text,
            "| {cell} | {} | {beside} | {ratio} | {goal} |",
            figure(row)
        );
    }
    text
}

fn figure(row: &Row) -> String {
    let interval = row.interval.map_or_else(String::new, |[low, high]| {
        format!(" [{}, {}]", number(low), number(high))
    });
    format!("{} {}{interval}", number(row.value), row.unit)
        .trim()
        .replace("  ", " ")
}

/// Three digits that count.
fn number(value: f64) -> String {
    let size = value.abs();
    match size {
        _ if !value.is_finite() => "-".to_owned(),
        _ if size >= 100.0 || value == 0.0 => format!("{value:.0}"),
        _ if size >= 10.0 => format!("{value:.1}"),
        _ if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dhcp_reclaim_tests::report::Machine;

    fn report(sections: &[&str]) -> Report {
        Report {
            machine: Machine {
                cpu: "a".into(),
                cpus: 2,
                kernel: "6.18".into(),
                date: "2026-11-26".into(),
                load: 0.0,
            },
            quick: false,
            seconds: 60,
            rows: sections
                .iter()
                .map(|section| {
                    Row::new(section, "one", 12.34, "ns")
                        .interval([-0.5, 250.4])
                        .beside("other", 24.68)
                        .goal("below 10", false)
                })
                .collect(),
        }
    }

    #[test]
    fn a_row_has_its_place_and_says_what_was_missed() {
        let text = docs(&report(&["cost: tap write"])).unwrap();
        let row = "| one | 12.3 ns [-0.500, 250] | other: 24.7 | 0.500 | below 10: **missed** |";
        assert!(text.contains(row), "{text}");
    }

    #[test]
    fn a_section_without_a_place_is_an_error() {
        assert!(docs(&report(&["cost: tap write", "costly"])).is_err());
    }
}
