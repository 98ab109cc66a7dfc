//! The trail of what people ordered, and who they were.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::control::Peer;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperatorEntry {
    pub ts: Timestamp,
    pub by: Peer,
    /// `pause`, `resume`, `release`.
    pub order: String,
    /// Its reason, or what came of it.
    pub text: Option<String>,
}
