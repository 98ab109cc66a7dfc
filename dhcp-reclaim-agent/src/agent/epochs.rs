//! When each of the coarse tier's epochs began.

use std::{collections::VecDeque, time::Duration};

use crate::core::Time;

/// Epochs whose beginning is remembered: what was heard before counts as not heard.
const EPOCHS: usize = 4096;

/// When each of the latest epochs began.
#[derive(Debug, Default)]
pub(super) struct Epochs {
    began: VecDeque<(u32, Time)>,
}

impl Epochs {
    pub(super) fn begin(&mut self, epoch: u32, at: Time) {
        self.began.push_back((epoch, at));
        if self.began.len() > EPOCHS {
            self.began.pop_front();
        }
    }

    /// How long ago the latest began.
    pub(super) fn age(&self, now: Time) -> Duration {
        self.began
            .back()
            .map_or(Duration::MAX, |(_, at)| now.since(*at))
    }

    pub(super) fn began(&self, epoch: u32) -> Option<Time> {
        let (first, _) = self.began.front()?;
        let index = usize::try_from(epoch.wrapping_sub(*first)).ok()?;
        self.began
            .get(index)
            .filter(|(known, _)| *known == epoch)
            .map(|(_, at)| *at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_is_known_until_it_is_too_old() {
        let mut epochs = Epochs::default();
        assert_eq!(epochs.began(1), None);
        assert_eq!(epochs.age(Time::ZERO), Duration::MAX);
        let first = u32::MAX - 1; // wraps
        for n in 0..=4096_u32 {
            epochs.begin(first.wrapping_add(n), Time::from_nanos(n.into()));
        }
        assert_eq!(
            epochs.age(Time::from_nanos(5000)),
            Duration::from_nanos(904)
        );
        assert_eq!(epochs.began(first), None);
        assert_eq!(
            epochs.began(first.wrapping_add(1)),
            Some(Time::from_nanos(1))
        );
        assert_eq!(
            epochs.began(first.wrapping_add(4096)),
            Some(Time::from_nanos(4096))
        );
        assert_eq!(epochs.began(first.wrapping_add(4097)), None);
    }
}
