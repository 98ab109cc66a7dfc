//! What `cargo xtask bench` measures, as rows of a table.
use serde::{Deserialize, Serialize};

/// One figure, and what stands beside it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    pub section: String,
    pub name: String,
    pub unit: String,
    pub value: f64,
    /// 95 % of the median, where the figure is a median.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval: Option<[f64; 2]>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub neighbour: Option<Neighbour>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub goal: Option<Goal>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub note: String,
}

/// What a user has today instead, measured in the same run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Neighbour {
    pub name: String,
    pub value: f64,
    /// This figure by the neighbour's, if that is not zero.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Goal {
    pub text: String,
    pub met: bool,
}

/// All rows of a run, and where it ran.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub machine: Machine,
    pub quick: bool,
    pub seconds: u64,
    pub rows: Vec<Row>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    pub cpu: String,
    pub cpus: usize,
    pub kernel: String,
    /// The day of the run, by UTC.
    pub date: String,
    /// Runnable processes besides the bench when it began.
    pub load: f64,
}

impl Row {
    pub fn new(section: &str, name: impl Into<String>, value: f64, unit: &str) -> Self {
        Self {
            section: section.to_owned(),
            name: name.into(),
            unit: unit.to_owned(),
            value,
            interval: None,
            neighbour: None,
            goal: None,
            note: String::new(),
        }
    }

    pub fn interval(mut self, interval: [f64; 2]) -> Self {
        self.interval = Some(interval);
        self
    }

    pub fn beside(mut self, name: impl Into<String>, value: f64) -> Self {
        let ratio = Some(self.value / value).filter(|ratio| ratio.is_finite());
        self.neighbour = Some(Neighbour {
            name: name.into(),
            value,
            ratio,
        });
        self
    }

    pub fn goal(mut self, text: impl Into<String>, met: bool) -> Self {
        self.goal = Some(Goal {
            text: text.into(),
            met,
        });
        self
    }

    pub fn note(mut self, note: impl Into<String>) -> Self {
        self.note = note.into();
        self
    }
}
