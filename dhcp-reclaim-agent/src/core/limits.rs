//! The two gates that look beyond one binding: how many die, and how fast we release.

use std::{collections::BTreeMap, net::Ipv4Addr, time::Duration};

use super::types::{Key, SegmentId, Time, Vlan};

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

/// A token bucket.
#[derive(Clone, Copy, Debug)]
pub struct Bucket {
    /// Nanoseconds that one token takes to come.
    interval: u64,
    /// Time that a full bucket is worth.
    depth: u64,
    /// The theoretical arrival time: the bucket is full again then.
    full_at: Time,
    /// Places in the queue are given away up to here.
    queued_until: Time,
}

impl Bucket {
    /// `rate` tokens a second, at most `burst` at once; neither is zero.
    pub fn new(rate: u32, burst: u32) -> Self {
        let interval = 1_000_000_000 / u64::from(rate.max(1));
        Self {
            interval,
            depth: interval * u64::from(burst.max(1)),
            full_at: Time::ZERO,
            queued_until: Time::ZERO,
        }
    }

    /// When the next token is there.
    pub fn ready_at(&self) -> Time {
        let need = (self.full_at.as_nanos() + self.interval).saturating_sub(self.depth);
        Time::from_nanos(need)
    }

    /// A time to come back at, of its own for each caller: many that wait do not all wake for one
    /// token.
    pub fn queue(&mut self, now: Time) -> Time {
        let place = self.ready_at().max(now).max(self.queued_until);
        self.queued_until = place + Duration::from_nanos(self.interval);
        place
    }

    /// Full, and nobody waits: as good as a new one.
    fn is_idle(&self, now: Time) -> bool {
        self.full_at <= now && self.queued_until <= now
    }

    pub fn take(&mut self, now: Time) -> bool {
        if now < self.ready_at() {
            return false;
        }
        self.full_at =
            Time::from_nanos(self.full_at.as_nanos().max(now.as_nanos()) + self.interval);
        true
    }
}

/// A server, as far as its pace goes: where its clients find it.
pub type ServerKey = (SegmentId, Vlan, Ipv4Addr);

/// Servers with a bucket of their own; all beyond share one.
const SERVERS: usize = 64;
/// What all servers together are sent, in terms of one server's pace.
const CEILING: u32 = 8;

/// How fast each server is sent RELEASEs: nothing answers them, and what a server's socket has no
/// room for is lost in silence (FACTS.md §5a).
#[derive(Clone, Debug)]
pub struct Pacing {
    rate: u32,
    burst: u32,
    servers: BTreeMap<ServerKey, Bucket>,
    others: Bucket,
    all: Bucket,
}

impl Pacing {
    /// For each server `rate` a second, at most `burst` at once.
    pub fn new(rate: u32, burst: u32) -> Self {
        Self {
            rate,
            burst,
            servers: BTreeMap::new(),
            others: Bucket::new(rate, burst),
            all: Bucket::new(rate.saturating_mul(CEILING), burst.saturating_mul(CEILING)),
        }
    }

    /// When a RELEASE to the server may leave: one with a place in the queue then, one without
    /// behind all that have one.
    pub fn ready_at(&self, server: ServerKey, turn: Option<Time>, now: Time) -> Time {
        let bucket = match self.servers.get(&server) {
            Some(bucket) => *bucket,
            None if self.servers.len() < SERVERS => Bucket::new(self.rate, self.burst),
            None => self.others,
        };
        let token = bucket.ready_at().max(self.all.ready_at());
        match turn {
            Some(turn) => token.max(turn),
            None if bucket.queued_until > now => token.max(bucket.queued_until),
            None => token,
        }
    }

    /// A place in the server's queue: the time to come back at.
    pub fn queue(&mut self, server: ServerKey, now: Time) -> Time {
        let all = self.all.ready_at();
        self.bucket(server, now).queue(now).max(all)
    }

    /// Takes a token, if there is one.
    pub fn take(&mut self, server: ServerKey, now: Time) -> bool {
        if now < self.all.ready_at() || !self.bucket(server, now).take(now) {
            return false;
        }
        self.all.take(now)
    }

    fn bucket(&mut self, server: ServerKey, now: Time) -> &mut Bucket {
        if !self.servers.contains_key(&server) {
            if self.servers.len() >= SERVERS {
                self.servers.retain(|_, bucket| !bucket.is_idle(now));
            }
            if self.servers.len() >= SERVERS {
                return &mut self.others;
            }
        }
        self.servers
            .entry(server)
            .or_insert_with(|| Bucket::new(self.rate, self.burst))
    }
}

#[cfg(test)]
mod tests {
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
    fn bucket_gives_a_burst_and_then_the_rate() {
        let mut bucket = Bucket::new(10, 3);
        let start = at(100);
        assert_eq!((0..10).filter(|_| bucket.take(start)).count(), 3);
        assert_eq!(bucket.ready_at(), start + Duration::from_millis(100));
        assert!(bucket.take(start + Duration::from_millis(100)));
        assert!(!bucket.take(start + Duration::from_millis(199)));
        assert_eq!(
            (0..10).filter(|_| bucket.take(at(200))).count(),
            3,
            "it never holds more than the burst"
        );
    }

    fn server(n: u8) -> ServerKey {
        (1, 0, Ipv4Addr::new(10, 0, 1, n))
    }

    #[test]
    fn each_server_has_its_own_pace() {
        let mut pacing = Pacing::new(10, 3);
        let start = at(100);
        for n in 1..=4 {
            let taken = (0..10).filter(|_| pacing.take(server(n), start)).count();
            assert_eq!(taken, 3, "server {n}");
        }
        let next = start + Duration::from_millis(100);
        assert_eq!(pacing.ready_at(server(1), None, start), next);
        assert!(pacing.ready_at(server(9), None, start) <= start);
    }

    #[test]
    fn all_servers_together_have_a_ceiling() {
        let mut pacing = Pacing::new(10, 1);
        let taken = (0..100)
            .filter(|n| pacing.take(server(*n), at(100)))
            .count();
        assert_eq!(taken, 8);
    }

    #[test]
    fn who_waits_is_served_before_who_comes() {
        let mut pacing = Pacing::new(10, 1);
        let start = at(100);
        assert!(pacing.take(server(1), start));
        let turns: Vec<Time> = (0..3).map(|_| pacing.queue(server(1), start)).collect();
        let expected = [1, 2, 3].map(|n| start + Duration::from_millis(100 * n));
        assert_eq!(turns, expected);
        // At the first one's time somebody new comes by.
        let behind = start + Duration::from_millis(400);
        assert_eq!(pacing.ready_at(server(1), None, turns[0]), behind);
        for turn in turns {
            assert!(pacing.ready_at(server(1), Some(turn), turn) <= turn);
            assert!(pacing.take(server(1), turn));
        }
        assert_eq!(pacing.ready_at(server(1), None, behind), behind);
    }

    #[test]
    fn the_number_of_buckets_is_bounded() {
        let mut pacing = Pacing::new(1000, 1);
        for n in 0..=255 {
            pacing.take(server(n), at(100));
            assert!(pacing.servers.len() <= SERVERS);
        }
        // Those that are full again make room.
        assert!(pacing.take(server(255), at(200)));
        assert!(pacing.servers.contains_key(&server(255)));
    }
}
