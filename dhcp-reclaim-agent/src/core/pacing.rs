//! How fast each server is sent RELEASEs: nothing answers them, and what a server's socket has no
//! room for is lost in silence (FACTS.md §5a).
//!
//! At most `burst` are on their way to a server, for as long as it shows how far it has read: it
//! answers what comes behind them in its queue (a [`Sounding`]), and is sent as many again as it has
//! read. So its pace is its own. Where it shows nothing, time is all there is: `rate` a second.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    time::Duration,
};

use super::types::{Key, SegmentId, Time, Vlan};

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

    /// Another pace; a token that was taken stays taken, and comes back at the new one.
    fn set_pace(&mut self, rate: u32, burst: u32, now: Time) {
        let owed = u64::try_from(self.full_at.since(now).as_nanos()).unwrap_or(u64::MAX);
        let tokens = owed.div_ceil(self.interval.max(1));
        let Self {
            interval, depth, ..
        } = Self::new(rate, burst);
        (self.interval, self.depth) = (interval, depth);
        self.full_at = now + Duration::from_nanos(tokens.saturating_mul(interval));
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
        self.take_ahead(now);
        true
    }

    /// Takes a token that is there by another measure than time; it never lacks more than its depth.
    fn take_ahead(&mut self, now: Time) {
        let full_at = self.full_at.as_nanos().max(now.as_nanos()) + self.interval;
        self.full_at = Time::from_nanos(full_at.min(now.as_nanos() + self.depth));
    }

    /// No more than `lacking` tokens are away.
    fn refill(&mut self, lacking: u64, now: Time) {
        let full_at = now.as_nanos() + lacking.saturating_mul(self.interval);
        self.full_at = self.full_at.min(Time::from_nanos(full_at));
    }
}

/// A server, as far as its pace goes: where its clients find it.
pub type ServerKey = (SegmentId, Vlan, Ipv4Addr);

/// Servers with a pace of their own; all beyond share one.
const SERVERS: usize = 64;
/// What all servers together are sent, in terms of one server's pace.
const CEILING: u32 = 8;
/// A server that has not answered is asked again.
const SOUND_AGAIN: Duration = Duration::from_secs(1);
/// One that has answered before is waited for this long: it may have been stopped, and what it is
/// sent then is lost. After that it counts as one that does not answer.
const WAIT: Duration = Duration::from_secs(30);
/// Who is called takes a token in this time, or is kept by something else.
const CALLED: Duration = Duration::from_secs(1);
/// Who gives way is back by then, with its answer.
const GAVE_WAY: Duration = Duration::from_secs(4);
/// A server's pace of late is that of at least this long.
const LATELY: Duration = Duration::from_secs(1);
/// One that never answered is left alone for this long.
const UNANSWERED: Duration = Duration::from_secs(600);

/// What is known of one server.
#[derive(Clone, Debug)]
struct Pace {
    burst: u32,
    /// By time: what counts for as long as the server shows nothing.
    bucket: Bucket,
    /// RELEASEs that it was sent, and how many of them it has read for sure.
    sent: u64,
    read: u64,
    /// It has answered a question: how far it has read is waited for.
    answers: bool,
    /// The latest question: how many it had been sent before, and when.
    asked: Option<(u64, Time)>,
    /// Since when questions are open.
    open_since: Option<Time>,
    not_before: Time,
    /// Who waits for a token, by their turns.
    waiting: BTreeSet<(Time, Key)>,
    /// Whose turn it is since when, and who has not taken a token yet.
    called: BTreeMap<Key, Time>,
    /// Who gave way since when, and has not taken one since.
    gave_way: BTreeMap<Key, Time>,
    /// How many it had read at the beginning of a second or more, and how many it read in the one before.
    read_at: (Time, u64),
    lately: u64,
}

impl Pace {
    fn new(rate: u32, burst: u32) -> Self {
        Self {
            burst: burst.max(1),
            bucket: Bucket::new(rate, burst),
            sent: 0,
            read: 0,
            answers: false,
            asked: None,
            open_since: None,
            not_before: Time::ZERO,
            waiting: BTreeSet::new(),
            called: BTreeMap::new(),
            gave_way: BTreeMap::new(),
            read_at: (Time::ZERO, 0),
            lately: 0,
        }
    }

    fn unread(&self) -> u64 {
        self.sent - self.read
    }

    /// Whether the server is waited for, rather than time.
    fn is_shown(&self, now: Time) -> bool {
        self.answers && self.open_since.is_none_or(|at| now.since(at) < WAIT)
    }

    fn ready_at(&self, now: Time) -> Time {
        if !self.is_shown(now) {
            return self.bucket.ready_at();
        }
        if self.unread() < u64::from(self.burst) {
            return now;
        }
        // Its answer comes sooner; if not, it is asked again.
        let again = self.asked.map_or(now, |(_, at)| at + SOUND_AGAIN);
        again.max(now + Duration::from_millis(1))
    }

    fn take(&mut self, now: Time) -> bool {
        self.give_up(now);
        if self.ready_at(now) > now {
            return false;
        }
        self.bucket.take_ahead(now);
        self.sent += 1;
        true
    }

    /// If it has been waited for long enough, time is the measure again: from an empty bucket on,
    /// since all that it was sent may still lie there.
    fn give_up(&mut self, now: Time) {
        if self.answers && !self.is_shown(now) {
            self.answers = false;
            self.bucket.full_at = Time::from_nanos(now.as_nanos() + self.bucket.depth);
        }
    }

    /// See [`Pacing::sounding`].
    fn sounding(&mut self, now: Time) -> Option<u64> {
        self.give_up(now);
        let ever = self.answers || self.read != 0;
        if !ever && self.open_since.is_some_and(|at| now.since(at) >= WAIT) {
            (self.open_since, self.not_before) = (None, now + UNANSWERED);
        }
        if now < self.not_before {
            return None;
        }
        let burst = u64::from(self.burst);
        // A question is work for the server, too: twice a burst keeps it busy.
        let step = (burst / 2).max(1);
        // What trickles is no burst: who is not known to answer is not asked for it.
        let lacking = self.bucket.full_at.since(now).as_nanos();
        let many = self.answers || lacking >= u128::from(self.bucket.depth / 4);
        let due = match self.asked {
            Some((mark, _)) if self.sent - mark >= step => many,
            Some((_, at)) => now.since(at) >= SOUND_AGAIN && self.unread() >= burst,
            None => many && self.unread() >= step,
        };
        if !due {
            return None;
        }
        self.asked = Some((self.sent, now));
        self.open_since.get_or_insert(now);
        Some(self.sent)
    }

    fn read_up_to(&mut self, mark: u64, now: Time) -> u64 {
        let before = self.unread();
        self.read = self.read.max(mark.min(self.sent));
        let (since, read) = self.read_at;
        if now.since(since) >= LATELY {
            self.lately = self.read - read;
            self.read_at = (now, self.read);
        }
        self.answers = true;
        let all = self.asked.is_none_or(|(asked, _)| asked <= mark);
        self.open_since = if all { None } else { Some(now) };
        self.bucket.refill(self.unread(), now);
        before - self.unread()
    }

    /// `key`, whose turn it is, is not ready. Others have its place, but no more than can be sent before
    /// they are not ready, either.
    fn give_way(&mut self, key: Key, now: Time) -> Vec<(Time, Key)> {
        if self.called.remove(&key).is_none() || !self.is_shown(now) {
            return Vec::new();
        }
        self.gave_way.retain(|_, at| now.since(*at) < GAVE_WAY);
        self.gave_way.insert(key, now);
        let most = (8 * u64::from(self.burst)).max(2 * self.lately);
        if self.gave_way.len() as u64 >= most {
            return Vec::new();
        }
        self.call(now)
    }

    /// Whose turn it is now: as many as may be sent.
    fn call(&mut self, now: Time) -> Vec<(Time, Key)> {
        // Something else keeps those who did not come.
        self.called.retain(|_, at| now.since(*at) < CALLED);
        let taken = self.unread() + self.called.len() as u64;
        let free = u64::from(self.burst).saturating_sub(taken);
        let mut next = Vec::new();
        for _ in 0..free {
            next.extend(self.waiting.pop_first());
        }
        self.called.extend(next.iter().map(|(_, key)| (*key, now)));
        if self.waiting.is_empty() {
            self.bucket.queued_until = now;
        }
        next
    }

    fn is_idle(&self, now: Time) -> bool {
        self.bucket.is_idle(now) && self.waiting.is_empty()
    }
}

/// The paces of all servers; see the module.
#[derive(Clone, Debug)]
pub struct Pacing {
    rate: u32,
    burst: u32,
    servers: BTreeMap<ServerKey, Pace>,
    others: Pace,
    all: Bucket,
}

impl Pacing {
    /// For each server `rate` a second, at most `burst` at once.
    pub fn new(rate: u32, burst: u32) -> Self {
        Self {
            rate,
            burst,
            servers: BTreeMap::new(),
            others: Pace::new(rate, burst),
            all: Bucket::new(rate.saturating_mul(CEILING), burst.saturating_mul(CEILING)),
        }
    }

    /// Another pace for each server, from its next RELEASE on.
    pub fn set_pace(&mut self, rate: u32, burst: u32, now: Time) {
        (self.rate, self.burst) = (rate, burst);
        for pace in self.servers.values_mut().chain([&mut self.others]) {
            pace.burst = burst.max(1);
            pace.bucket.set_pace(rate, burst, now);
        }
        let (rate, burst) = (rate.saturating_mul(CEILING), burst.saturating_mul(CEILING));
        self.all.set_pace(rate, burst, now);
    }

    /// When a RELEASE to the server may leave: one with a place in the queue then, one without
    /// behind all that have one.
    pub fn ready_at(&self, server: ServerKey, turn: Option<Time>, now: Time) -> Time {
        let (token, queued_until) = match self.servers.get(&server) {
            Some(pace) => (pace.ready_at(now), pace.bucket.queued_until),
            None if self.servers.len() < SERVERS => (Time::ZERO, Time::ZERO),
            None => (self.others.ready_at(now), self.others.bucket.queued_until),
        };
        let token = token.max(self.all.ready_at());
        token.max(turn.unwrap_or(queued_until))
    }

    /// A place in the server's queue: the time to come back at, unless the server reads on sooner.
    pub fn queue(&mut self, server: ServerKey, key: Key, now: Time) -> Time {
        let all = self.all.ready_at();
        let pace = self.pace(server, now);
        let turn = pace.bucket.queue(now).max(all);
        pace.waiting.insert((turn, key));
        turn
    }

    /// Takes a token, if there is one; `turn` is the place that `key` had in the queue.
    pub fn take(&mut self, server: ServerKey, key: Key, turn: Option<Time>, now: Time) -> bool {
        let all = self.all.ready_at();
        let pace = self.pace(server, now);
        if let Some(turn) = turn {
            pace.waiting.remove(&(turn, key));
        }
        pace.called.remove(&key);
        pace.gave_way.remove(&key);
        if now < all || !pace.take(now) {
            return false;
        }
        self.all.take(now)
    }

    /// `key` does not wait any more.
    pub fn leave(&mut self, server: ServerKey, key: Key, turn: Time) {
        let pace = self.servers.get_mut(&server).unwrap_or(&mut self.others);
        pace.waiting.remove(&(turn, key));
        pace.called.remove(&key);
        pace.gave_way.remove(&key);
        if pace.waiting.is_empty() {
            pace.bucket.queued_until = Time::ZERO;
        }
    }

    /// Whether the server is waited for, rather than time.
    pub fn is_shown(&self, server: ServerKey, now: Time) -> bool {
        self.servers
            .get(&server)
            .unwrap_or(&self.others)
            .is_shown(now)
    }

    /// `key`, whose turn it was, waits again.
    pub fn wait_again(&mut self, server: ServerKey, key: Key, turn: Time) {
        let pace = self.servers.get_mut(&server).unwrap_or(&mut self.others);
        pace.waiting.insert((turn, key));
        pace.called.remove(&key);
    }

    /// `key`, whose turn it is, is not ready: whose turn it is instead, as [`Self::read_up_to`] says it.
    pub fn give_way(&mut self, server: ServerKey, key: Key, now: Time) -> Vec<(Time, Key)> {
        let pace = self.servers.get_mut(&server).unwrap_or(&mut self.others);
        pace.give_way(key, now)
    }

    /// Whether the server is to be asked how far it has read, behind all that it was sent by now: the
    /// mark for [`Self::read_up_to`].
    pub fn sounding(&mut self, server: ServerKey, now: Time) -> Option<u64> {
        self.servers.get_mut(&server)?.sounding(now)
    }

    /// The server has read what it was sent up to this mark. Returns whose turn it is now, with the
    /// turn that each of them had.
    pub fn read_up_to(&mut self, server: ServerKey, mark: u64, now: Time) -> Vec<(Time, Key)> {
        let Some(pace) = self.servers.get_mut(&server) else {
            return Vec::new();
        };
        let read = pace.read_up_to(mark, now);
        let next = pace.call(now);
        // What it has read weighs on nobody any more.
        let lacking = self.all.full_at.since(now).as_nanos() / u128::from(self.all.interval);
        let lacking = u64::try_from(lacking).unwrap_or(u64::MAX);
        self.all.refill(lacking.saturating_sub(read), now);
        next
    }

    fn pace(&mut self, server: ServerKey, now: Time) -> &mut Pace {
        if !self.servers.contains_key(&server) {
            if self.servers.len() >= SERVERS {
                self.servers.retain(|_, pace| !pace.is_idle(now));
            }
            if self.servers.len() >= SERVERS {
                return &mut self.others;
            }
        }
        self.servers
            .entry(server)
            .or_insert_with(|| Pace::new(self.rate, self.burst))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(secs: u64) -> Time {
        Time::ZERO + Duration::from_secs(secs)
    }

    fn key(n: u8) -> Key {
        Key {
            segment: 1,
            vlan: 0,
            ip: Ipv4Addr::new(10, 0, 0, n),
        }
    }

    fn take(pacing: &mut Pacing, n: u8, now: Time) -> bool {
        pacing.take(server(n), key(0), None, now)
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
            let taken = (0..10).filter(|_| take(&mut pacing, n, start)).count();
            assert_eq!(taken, 3, "server {n}");
        }
        let next = start + Duration::from_millis(100);
        assert_eq!(pacing.ready_at(server(1), None, start), next);
        assert!(pacing.ready_at(server(9), None, start) <= start);
    }

    #[test]
    fn all_servers_together_have_a_ceiling() {
        let mut pacing = Pacing::new(10, 1);
        let taken = (0..100).filter(|n| take(&mut pacing, *n, at(100))).count();
        assert_eq!(taken, 8);
    }

    #[test]
    fn who_waits_is_served_before_who_comes() {
        let mut pacing = Pacing::new(10, 1);
        let start = at(100);
        assert!(take(&mut pacing, 1, start));
        let turns: Vec<Time> = (0..3)
            .map(|n| pacing.queue(server(1), key(n), start))
            .collect();
        let expected = [1, 2, 3].map(|n| start + Duration::from_millis(100 * n));
        assert_eq!(turns, expected);
        // At the first one's time somebody new comes by.
        let behind = start + Duration::from_millis(400);
        assert_eq!(pacing.ready_at(server(1), None, turns[0]), behind);
        for turn in turns {
            assert!(pacing.ready_at(server(1), Some(turn), turn) <= turn);
            assert!(pacing.take(server(1), key(0), Some(turn), turn));
        }
        assert_eq!(pacing.ready_at(server(1), None, behind), behind);
    }

    #[test]
    fn another_pace_gives_back_nothing_that_was_taken() {
        let start = at(100);
        let mut pacing = Pacing::new(10, 3);
        while take(&mut pacing, 1, start) {}
        pacing.set_pace(1, 3, start);
        assert!(!take(&mut pacing, 1, start), "its burst was spent");
        let later = at(200);
        pacing.set_pace(100, 30, later);
        assert_eq!(take_all(&mut pacing, later), 30);
        let of_a_new_one = (0..100).filter(|_| take(&mut pacing, 2, later)).count();
        assert_eq!(of_a_new_one, 30);
    }

    #[test]
    fn the_number_of_buckets_is_bounded() {
        let mut pacing = Pacing::new(1000, 1);
        for n in 0..=255 {
            take(&mut pacing, n, at(100));
            assert!(pacing.servers.len() <= SERVERS);
        }
        // Those that are full again make room.
        assert!(take(&mut pacing, 255, at(200)));
        assert!(pacing.servers.contains_key(&server(255)));
    }

    /// Takes as many as there are.
    fn take_all(pacing: &mut Pacing, now: Time) -> usize {
        (0..1000).take_while(|_| take(pacing, 1, now)).count()
    }

    #[test]
    fn a_server_that_reads_on_is_sent_as_many_again() {
        let mut pacing = Pacing::new(1, 8);
        let start = at(100);
        let mut marks = Vec::new();
        for _ in 0..8 {
            assert!(take(&mut pacing, 1, start));
            marks.extend(pacing.sounding(server(1), start));
        }
        assert_eq!(marks, [4, 8]);
        assert!(!take(&mut pacing, 1, start), "a burst is on its way");
        let soon = start + Duration::from_millis(1);
        pacing.read_up_to(server(1), 4, soon);
        assert_eq!(take_all(&mut pacing, soon), 4);
        // An older answer says nothing new.
        pacing.read_up_to(server(1), 2, soon);
        assert_eq!(take_all(&mut pacing, soon), 0);
        pacing.read_up_to(server(1), 12, soon);
        assert_eq!(take_all(&mut pacing, soon), 8);
    }

    #[test]
    fn a_server_that_stopped_reading_is_waited_for_and_asked_again() {
        let mut pacing = Pacing::new(50, 8);
        let start = at(100);
        assert_eq!(take_all(&mut pacing, start), 8);
        assert_eq!(pacing.sounding(server(1), start), Some(8));
        pacing.read_up_to(server(1), 8, start);
        assert_eq!(take_all(&mut pacing, start), 8);
        assert_eq!(pacing.sounding(server(1), start), Some(16));
        // Time gives nothing, and the question is repeated.
        for secs in 1..29 {
            let now = start + Duration::from_secs(secs);
            assert_eq!(take_all(&mut pacing, now), 0, "after {secs} s");
        }
        let late = start + Duration::from_secs(29);
        assert!(pacing.ready_at(server(1), None, late) > late);
        assert_eq!(pacing.sounding(server(1), late), Some(16));
        assert_eq!(pacing.read_up_to(server(1), 16, late), []);
        assert_eq!(take_all(&mut pacing, late), 8);
    }

    #[test]
    fn a_server_that_does_not_answer_any_more_gets_its_rate() {
        let mut pacing = Pacing::new(10, 4);
        let start = at(100);
        assert_eq!(take_all(&mut pacing, start), 4);
        assert_eq!(pacing.sounding(server(1), start), Some(4));
        pacing.read_up_to(server(1), 4, start);
        assert_eq!(take_all(&mut pacing, start), 4);
        assert_eq!(pacing.sounding(server(1), start), Some(8));
        let given_up = start + WAIT;
        assert_eq!(pacing.sounding(server(1), given_up), Some(8));
        assert_eq!(
            take_all(&mut pacing, given_up),
            0,
            "what it was sent may lie there"
        );
        assert_eq!(
            take_all(&mut pacing, given_up + Duration::from_millis(100)),
            1
        );
    }

    #[test]
    fn those_who_wait_are_told_in_their_order() {
        let mut pacing = Pacing::new(1, 4);
        let start = at(100);
        assert_eq!(take_all(&mut pacing, start), 4);
        let mark = pacing.sounding(server(1), start).unwrap();
        let turns: Vec<Time> = (1..=6)
            .map(|n| pacing.queue(server(1), key(n), start))
            .collect();
        pacing.leave(server(1), key(2), turns[1]);
        let next = pacing.read_up_to(server(1), mark, start);
        let keys: Vec<Key> = next.iter().map(|(_, key)| *key).collect();
        assert_eq!(keys, [1, 3, 4, 5].map(key));
    }

    #[test]
    fn a_trickle_is_not_asked_about() {
        let mut pacing = Pacing::new(50, 32);
        for secs in 0..100 {
            assert!(take(&mut pacing, 1, at(secs)));
            assert_eq!(pacing.sounding(server(1), at(secs)), None);
        }
    }

    #[test]
    fn the_ceiling_is_for_what_nobody_has_read() {
        let mut pacing = Pacing::new(10, 4);
        let now = at(100);
        for _ in 0..100 {
            assert_eq!(take_all(&mut pacing, now), 4);
            let sent = pacing.servers[&server(1)].sent;
            pacing.read_up_to(server(1), sent, now);
        }
    }

    #[test]
    fn what_one_server_has_read_is_room_for_no_more_than_that() {
        let mut pacing = Pacing::new(1, 4);
        let now = at(100);
        for n in 1..=8 {
            let taken = (0..9).filter(|_| take(&mut pacing, n, now)).count();
            assert_eq!(taken, 4, "server {n}");
        }
        assert!(
            !take(&mut pacing, 9, now),
            "all together have their ceiling"
        );
        pacing.read_up_to(server(1), 2, now);
        let taken = (0..9).filter(|_| take(&mut pacing, 9, now)).count();
        assert_eq!(taken, 2);
    }

    #[test]
    fn a_server_that_is_waited_for_is_not_forgotten_for_another() {
        let mut pacing = Pacing::new(1, 16);
        let now = at(100);
        for n in 0..64 {
            assert!(take(&mut pacing, n, now));
        }
        // All beyond share one pace.
        let shared = (0..99).take_while(|_| take(&mut pacing, 100, now)).count();
        assert_eq!(shared, 16);
        assert!(pacing.ready_at(server(101), None, now) > now);
        let left = (0..99).take_while(|_| take(&mut pacing, 0, now)).count();
        assert_eq!(left, 15, "its first token is still taken");
        // Those that took one are as good as new soon; the shared pace is not.
        let soon = now + Duration::from_secs(2);
        assert!(take(&mut pacing, 102, soon));
        assert!(pacing.servers.len() < SERVERS);
        assert!(pacing.ready_at(server(103), None, soon) <= soon);
        assert!(pacing.others.ready_at(soon) <= soon);
        while pacing.others.take(soon) {}
        assert!(pacing.ready_at(server(103), None, soon) <= soon);
        // And nobody makes room for whom there is room.
        let later = at(1000);
        for n in [1, 2] {
            assert!(take(&mut pacing, n, later));
        }
        assert!(pacing.servers.contains_key(&server(102)));
    }

    #[test]
    fn one_that_never_answers_is_left_alone_for_a_while() {
        let mut pacing = Pacing::new(1, 8);
        let start = at(100);
        assert_eq!(take_all(&mut pacing, start), 8);
        assert_eq!(pacing.sounding(server(1), start), Some(8));
        let mut ask = |secs| {
            let now = at(secs);
            take_all(&mut pacing, now);
            pacing.sounding(server(1), now)
        };
        assert_eq!(ask(130), None);
        assert_eq!(ask(200), None);
        assert_eq!(ask(729), None);
        assert!(ask(730).is_some());
    }

    #[test]
    fn a_server_with_room_is_not_asked_twice() {
        let mut pacing = Pacing::new(1, 16);
        let start = at(100);
        for _ in 0..8 {
            assert!(take(&mut pacing, 1, start));
        }
        assert_eq!(pacing.sounding(server(1), start), Some(8));
        let later = start + Duration::from_secs(2);
        assert_eq!(pacing.sounding(server(1), later), None, "half is not all");
        for _ in 0..7 {
            assert!(take(&mut pacing, 1, later));
        }
        assert_eq!(pacing.sounding(server(1), later), None);
    }

    #[test]
    fn one_that_has_answered_all_is_still_one_that_answers() {
        let mut pacing = Pacing::new(1, 8);
        let start = at(100);
        assert_eq!(take_all(&mut pacing, start), 8);
        assert_eq!(pacing.sounding(server(1), start), Some(8));
        pacing.read_up_to(server(1), 8, start);
        let later = start + WAIT + WAIT;
        assert_eq!(take_all(&mut pacing, later), 8);
        assert_eq!(pacing.sounding(server(1), later), Some(16));
        pacing.read_up_to(server(1), 16, later);
        assert_eq!(take_all(&mut pacing, later), 8, "no time has passed");
    }

    #[test]
    fn who_was_called_has_a_while_to_come_and_may_wait_again() {
        let mut pacing = Pacing::new(1, 4);
        let start = at(100);
        assert_eq!(take_all(&mut pacing, start), 4);
        let mark = pacing.sounding(server(1), start).unwrap();
        let turns: Vec<Time> = (1..=6)
            .map(|n| pacing.queue(server(1), key(n), start))
            .collect();
        let keys =
            |next: Vec<(Time, Key)>| -> Vec<Key> { next.into_iter().map(|(_, key)| key).collect() };
        let called = keys(pacing.read_up_to(server(1), mark, start));
        assert_eq!(called, [1, 2, 3, 4].map(key));
        // Their places are taken until they come.
        assert_eq!(pacing.read_up_to(server(1), mark, start), []);
        assert!(pacing.take(server(1), key(1), Some(turns[0]), start));
        assert_eq!(pacing.read_up_to(server(1), mark, start), []);
        // One is not ready, and another has its place.
        pacing.wait_again(server(1), key(2), turns[1]);
        let called = keys(pacing.read_up_to(server(1), mark, start));
        assert_eq!(called, [2].map(key));
        // Those who do not come give way; one of four is on its way.
        let late = start + CALLED;
        let called = keys(pacing.read_up_to(server(1), mark, late));
        assert_eq!(called, [5, 6].map(key));
    }

    #[test]
    fn others_have_the_place_of_whoever_gives_way_but_not_all_of_them() {
        let mut pacing = Pacing::new(1, 4);
        let start = at(100);
        assert_eq!(take_all(&mut pacing, start), 4);
        let mark = pacing.sounding(server(1), start).unwrap();
        for n in 1..=200 {
            pacing.queue(server(1), key(n), start);
        }
        let give_way = |pacing: &mut Pacing, mut next: Vec<(Time, Key)>, now| {
            let mut asked = Vec::new();
            while let Some((_, key)) = next.pop() {
                asked.push(key);
                next.extend(pacing.give_way(server(1), key, now));
            }
            asked
        };
        let next = pacing.read_up_to(server(1), mark, start);
        let asked = give_way(&mut pacing, next, start);
        // Those that were called by then are asked, too.
        let most = 8 * 4..8 * 4 + 4;
        assert!(most.contains(&asked.len()), "{}", asked.len());
        // One that was sent for is not asked any more: another is.
        assert!(pacing.take(server(1), asked[0], None, start));
        let next = pacing.read_up_to(server(1), mark, start);
        assert_eq!(next.len(), 3);
        assert_eq!(give_way(&mut pacing, next, start).len(), 3);
        // Those that do not come back are not waited for.
        let later = start + GAVE_WAY;
        let next = pacing.read_up_to(server(1), mark, later);
        assert!(most.contains(&give_way(&mut pacing, next, later).len()));
        assert_eq!(pacing.give_way(server(1), key(199), later), []);
    }

    #[test]
    fn who_was_not_called_has_no_place_to_give() {
        let mut pacing = Pacing::new(1, 4);
        let start = at(100);
        assert_eq!(take_all(&mut pacing, start), 4);
        let mark = pacing.sounding(server(1), start).unwrap();
        assert_eq!(pacing.read_up_to(server(1), mark, start), []);
        for n in 1..=2 {
            pacing.queue(server(1), key(n), start);
        }
        assert_eq!(pacing.give_way(server(1), key(2), start), []);
        assert_eq!(pacing.read_up_to(server(1), mark, start).len(), 2);
    }

    #[test]
    fn as_many_are_asked_as_the_server_reads_in_two_seconds() {
        let mut pace = Pace::new(1, 4);
        let mut now = at(100);
        for _ in 0..30 {
            pace.sent += 100;
            pace.read_up_to(pace.sent, now);
            now = now + Duration::from_millis(100);
        }
        assert_eq!(pace.lately, 1000);
        for n in 0..3000 {
            let key = Key {
                ip: Ipv4Addr::from_bits(n),
                ..key(0)
            };
            pace.waiting.insert((now, key));
        }
        let mut next = pace.call(now);
        let mut asked = 0;
        while let Some((_, key)) = next.pop() {
            asked += 1;
            next.extend(pace.give_way(key, now));
        }
        assert!((2000..2004).contains(&asked), "{asked}");
    }
}
