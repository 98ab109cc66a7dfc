//! `pause` and `resume`: a hold on all releases of the node, and its end.

use super::{Query, print, unexpected};
use crate::control::{Request, Response, ResumeView, json_line, printable};

/// Hold all releases of this node, until `resume`
///
/// Leases are learned and deaths noticed as ever; what is dead by then is released after `resume`. The
/// hold outlives the agent. For root only.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Why, for whoever finds it: `explain`, `stats` and `list` show it
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    #[command(flatten)]
    query: Query,
}

/// End a `pause`, and close the breaker if it is open
///
/// For root only.
#[derive(Debug, clap::Args)]
pub struct ResumeArgs {
    #[command(flatten)]
    query: Query,
}

pub fn main(args: &Args) -> anyhow::Result<()> {
    let reason = args.reason.clone();
    order(&args.query, &Request::Pause { reason })
}

pub fn resume(args: &ResumeArgs) -> anyhow::Result<()> {
    order(&args.query, &Request::Resume)
}

fn order(query: &Query, request: &Request) -> anyhow::Result<()> {
    let mut text = String::new();
    query.ask(request, |answer| {
        text = match answer {
            Response::Paused(view) if query.json => json_line(&view)?,
            Response::Resumed(view) if query.json => json_line(&view)?,
            Response::Paused(view) => printable(&view.text()).into_owned(),
            Response::Resumed(view) => resumed(&view),
            other => return Err(unexpected(&other)),
        };
        text.push('\n');
        Ok(())
    })?;
    print(&text)
}

pub(super) fn resumed(view: &ResumeView) -> String {
    let pause = view.paused.as_ref();
    let pause = pause.map(|pause| format!("releases go on (it was {})", pause.text()));
    let breaker = view.breaker_closed.then(|| "breaker closed".to_owned());
    let text: Vec<String> = pause.into_iter().chain(breaker).collect();
    if text.is_empty() {
        return "nothing was held: neither a pause nor the breaker".to_owned();
    }
    printable(&text.join("; ")).into_owned()
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::control::{PauseView, Peer};

    #[test]
    fn what_was_ended_is_said() {
        let view = |paused: bool, breaker_closed| ResumeView {
            paused: paused.then(|| PauseView {
                since: Timestamp::from_second(1_700_000_000).unwrap(),
                by: Peer { uid: 0, pid: 7 },
                reason: Some("kernel\u{1b} upgrade".to_owned()),
            }),
            breaker_closed,
        };
        assert_eq!(
            resumed(&view(true, true)),
            "releases go on (it was paused since 2023-11-14T22:13:20Z by uid 0, pid 7: \
             kernel\\u{1b} upgrade); breaker closed"
        );
        assert_eq!(resumed(&view(false, true)), "breaker closed");
        assert_eq!(
            resumed(&view(false, false)),
            "nothing was held: neither a pause nor the breaker"
        );
    }
}
