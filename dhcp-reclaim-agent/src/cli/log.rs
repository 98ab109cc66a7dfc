//! Logs on stderr: for a terminal, for a file, or for the journal.

use std::{env, fmt, io, io::IsTerminal as _};

use anyhow::Context as _;
use nix::sys::stat::fstat;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::{
    EnvFilter,
    fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter, format, format::Writer},
    registry::LookupSpan,
};

use super::run::{LogFormat, LogLevel};

pub(super) fn start(level: Option<LogLevel>, format: LogFormat) -> anyhow::Result<()> {
    let filter = match level {
        Some(level) => EnvFilter::new(level.name()),
        None => match env::var("RUST_LOG") {
            Ok(directives) if !directives.is_empty() => {
                EnvFilter::try_new(directives).context("RUST_LOG is not a log filter")?
            }
            Ok(_) | Err(_) => EnvFilter::new(LogLevel::Info.name()),
        },
    };
    let sink = Sink {
        journal: is_journal(),
        terminal: io::stderr().is_terminal(),
    };
    tracing::subscriber::set_global_default(subscriber(filter, format, sink, io::stderr))
        .context("cannot start logging")
}

/// Where lines go.
#[derive(Clone, Copy, Debug)]
struct Sink {
    /// It has a clock of its own, and wants each line's priority before it (sd-daemon(3)).
    journal: bool,
    terminal: bool,
}

fn subscriber<W>(
    filter: EnvFilter,
    format: LogFormat,
    sink: Sink,
    writer: W,
) -> Box<dyn Subscriber + Send + Sync>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let logging = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .with_ansi(sink.terminal && !sink.journal);
    match (format, sink.journal) {
        (LogFormat::Text, false) => Box::new(logging.finish()),
        (LogFormat::Text, true) => Box::new(
            logging
                .event_format(Prioritized(format::Format::default().without_time()))
                .finish(),
        ),
        (LogFormat::Json, false) => Box::new(logging.json().flatten_event(true).finish()),
        (LogFormat::Json, true) => Box::new(
            logging
                .json()
                .map_event_format(|json| Prioritized(json.flatten_event(true)))
                .finish(),
        ),
    }
}

/// Whether stderr is the stream that systemd names (systemd.exec(5)): a child that was given another
/// one inherits the variable, too.
fn is_journal() -> bool {
    let Ok(stat) = fstat(io::stderr()) else {
        return false;
    };
    let here = format!("{}:{}", stat.st_dev, stat.st_ino);
    env::var("JOURNAL_STREAM").is_ok_and(|stream| stream == here)
}

struct Prioritized<F>(F);

impl<S, N, F> FormatEvent<S, N> for Prioritized<F>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
    N: for<'writer> FormatFields<'writer> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        write!(writer, "<{}>", priority(*event.metadata().level()))?;
        self.0.format_event(context, writer, event)
    }
}

/// As syslog counts them (RFC 5424 section 6.2.1).
fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(format: LogFormat, journal: bool) -> Vec<String> {
        let lines = Lines::default();
        let writer = lines.clone();
        let sink = Sink {
            journal,
            terminal: false,
        };
        let filter = EnvFilter::new("debug");
        let logging = subscriber(filter, format, sink, move || writer.clone());
        tracing::subscriber::with_default(logging, || {
            tracing::error!("stopping");
            tracing::warn!(port = "vm1", "odd");
            tracing::info!("released");
            tracing::debug!("state");
        });
        let text = lines.0.lock().unwrap().clone();
        let text = String::from_utf8(text).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn the_journal_is_told_priorities_and_no_times() {
        let lines = logged(LogFormat::Text, true);
        let starts: Vec<&str> = lines.iter().map(|line| &line[..3]).collect();
        assert_eq!(starts, ["<3>", "<4>", "<6>", "<7>"]);
        assert!(lines[1].starts_with("<4> WARN "), "{}", lines[1]);
        assert!(lines[1].ends_with("odd port=\"vm1\""), "{}", lines[1]);
    }

    #[test]
    fn json_is_json_there_too() {
        for journal in [false, true] {
            let lines = logged(LogFormat::Json, journal);
            assert_eq!(lines.len(), 4);
            for (line, priority) in lines.iter().zip([3, 4, 6, 7]) {
                let prefix = format!("<{priority}>");
                let json = if journal {
                    line.strip_prefix(&prefix).unwrap()
                } else {
                    line
                };
                let json: serde_json::Value = serde_json::from_str(json).unwrap();
                assert!(
                    json["message"].is_string() && json["level"].is_string(),
                    "{json}"
                );
            }
        }
    }

    #[test]
    fn a_file_has_times_and_no_colours() {
        let lines = logged(LogFormat::Text, false);
        assert!(lines.iter().all(|line| line.starts_with("20")), "{lines:?}");
        assert!(!lines.iter().any(|line| line.contains('\u{1b}')));
    }
}
