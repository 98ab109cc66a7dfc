//! The gate that looks beyond one binding: how many die at once.

use std::{collections::BTreeMap, time::Duration};

use super::types::{Key, Time};

/// Opens when too many of the node's bindings die at once: then it is more likely that we are
/// blind than that they are dead.
#[derive(Clone, Debug, Default)]
pub struct Breaker {
    /// When each binding that still counts as dead died, and whether it was released since.
    deaths: BTreeMap<Key, (Time, bool)>,
    /// How many of them were released.
    released: usize,
    /// The first death that the window may have left behind.
    oldest: Option<Time>,
    opened_at: Option<Time>,
}

/// What the breaker counts against.
#[derive(Clone, Copy, Debug)]
pub struct BreakerRule {
    pub share: f64,
    pub min: usize,
    pub window: Duration,
}

impl BreakerRule {
    /// Deaths that a node with `total` bindings may have in one window.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a count of bindings, far below 2^52"
    )]
    pub fn allowed(self, total: usize) -> usize {
        self.min.max((total as f64 * self.share) as usize)
    }
}

impl Breaker {
    /// `key` died; opens the breaker if that was one too many. `live` counts the node's bindings
    /// that have not ended, the dead among them.
    pub fn died(&mut self, key: Key, now: Time, live: usize, rule: BreakerRule) {
        let aged = self.oldest.is_some_and(|at| now.since(at) >= rule.window);
        if self.opened_at.is_none() && aged {
            self.deaths
                .retain(|_, (at, _)| now.since(*at) < rule.window);
            self.released = self
                .deaths
                .values()
                .filter(|(_, released)| *released)
                .count();
            self.oldest = self.deaths.values().map(|(at, _)| *at).min();
        }
        self.deaths.entry(key).or_insert((now, false));
        self.oldest.get_or_insert(now);
        if self.opened_at.is_none() && self.deaths.len() > self.allowed(live, rule) {
            self.opened_at = Some(now);
        }
    }

    /// `key` was released: it still counts as dead in its window.
    pub fn released(&mut self, key: Key) {
        if let Some((_, released)) = self.deaths.get_mut(&key) {
            self.released += usize::from(!*released);
            *released = true;
        }
    }

    /// Deaths that one window may have: what was released in it belongs to the node's total.
    pub fn allowed(&self, live: usize, rule: BreakerRule) -> usize {
        rule.allowed(live + self.released)
    }

    /// `key` lives after all, or was lost in another way: that is recovery. Returns whether the
    /// breaker closed by it.
    pub fn recovered(&mut self, key: Key, live: usize, rule: BreakerRule) -> bool {
        if let Some((_, true)) = self.deaths.remove(&key) {
            self.released -= 1;
        }
        let closes = self.opened_at.is_some() && self.deaths.len() <= self.allowed(live, rule);
        if closes {
            self.opened_at = None;
        }
        closes
    }

    pub fn opened_at(&self) -> Option<Time> {
        self.opened_at
    }

    pub fn deaths(&self) -> usize {
        self.deaths.len()
    }

    /// A person says go on.
    pub fn reset(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn key(n: u8) -> Key {
        Key {
            segment: 1,
            vlan: 0,
            ip: Ipv4Addr::new(10, 0, 0, n),
        }
    }

    fn at(secs: u64) -> Time {
        Time::ZERO + Duration::from_secs(secs)
    }

    const RULE: BreakerRule = BreakerRule {
        share: 0.5,
        min: 2,
        window: Duration::from_secs(60),
    };

    #[test]
    fn breaker_counts_one_window() {
        let mut breaker = Breaker::default();
        for (n, secs) in [(1, 0), (2, 1), (3, 70)] {
            breaker.died(key(n), at(secs), 4, RULE);
        }
        assert_eq!(breaker.opened_at(), None, "two deaths had left the window");
        breaker.died(key(4), at(71), 4, RULE);
        breaker.died(key(5), at(72), 4, RULE);
        assert_eq!(breaker.opened_at(), Some(at(72)));
    }

    #[test]
    fn breaker_closes_by_recovery_and_not_by_waiting() {
        let mut breaker = Breaker::default();
        for n in 1..=3 {
            breaker.died(key(n), at(0), 4, RULE);
        }
        breaker.died(key(4), at(1000), 4, RULE);
        assert_eq!(
            breaker.opened_at(),
            Some(at(0)),
            "time alone does not close it"
        );
        assert!(!breaker.recovered(key(1), 4, RULE));
        assert!(breaker.recovered(key(2), 4, RULE));
        assert_eq!(breaker.opened_at(), None);
    }

    #[test]
    fn a_window_ends_where_the_next_begins() {
        let mut breaker = Breaker::default();
        for (n, secs) in [(1, 0), (2, 1), (3, 2), (4, 60)] {
            breaker.died(key(n), at(secs), 9, RULE);
        }
        assert_eq!(breaker.deaths(), 3, "the first had left it");
    }

    #[test]
    fn what_was_released_in_the_window_belongs_to_the_total() {
        let mut breaker = Breaker::default();
        for n in 1..=3 {
            breaker.died(key(n), at(0), 8, RULE);
            breaker.released(key(n));
            breaker.released(key(n));
        }
        // Half of eight, of which five still live.
        breaker.died(key(4), at(1), 5, RULE);
        assert_eq!(breaker.opened_at(), None);
        breaker.died(key(5), at(2), 5, RULE);
        assert_eq!(breaker.opened_at(), Some(at(2)));
    }

    #[test]
    fn who_was_released_and_comes_back_counts_once() {
        let mut breaker = Breaker::default();
        for n in 1..=2 {
            breaker.died(key(n), at(0), 8, RULE);
            breaker.released(key(n));
        }
        assert_eq!(breaker.allowed(6, RULE), 4);
        assert!(!breaker.recovered(key(1), 7, RULE));
        assert_eq!(breaker.deaths(), 1);
        assert_eq!(breaker.allowed(6, RULE), 3);
    }
}
