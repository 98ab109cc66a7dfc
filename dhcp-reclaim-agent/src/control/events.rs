//! What happened of late, and who is listening.

use std::{collections::VecDeque, net::Ipv4Addr, sync::Arc};

use tokio::sync::broadcast;

use super::EventView;

/// Events that a follower may be behind before it is cut off.
const FOLLOWER_QUEUE: usize = 1024;

/// The latest events, bounded, and the followers of the next.
#[derive(Debug)]
pub struct EventLog {
    past: VecDeque<Arc<EventView>>,
    capacity: usize,
    live: broadcast::Sender<Arc<EventView>>,
}

/// What a client of `events` is given.
#[derive(Debug)]
pub struct EventFeed {
    /// Oldest first.
    pub past: Vec<Arc<EventView>>,
    /// With `follow`: everything after `past`, without a gap.
    pub live: Option<broadcast::Receiver<Arc<EventView>>>,
}

impl EventLog {
    /// Remembers `capacity` events.
    pub fn new(capacity: usize) -> Self {
        let (live, _) = broadcast::channel(FOLLOWER_QUEUE);
        Self {
            past: VecDeque::new(),
            capacity,
            live,
        }
    }

    pub fn push(&mut self, event: EventView) {
        let event = Arc::new(event);
        // Fails only when nobody follows.
        let _followers = self.live.send(Arc::clone(&event));
        self.past.push_back(event);
        while self.past.len() > self.capacity {
            self.past.pop_front();
        }
    }

    pub fn feed(&self, follow: bool) -> EventFeed {
        EventFeed {
            past: self.past.iter().cloned().collect(),
            live: follow.then(|| self.live.subscribe()),
        }
    }

    /// What is remembered about an address, oldest first.
    pub fn history(&self, ip: Ipv4Addr) -> Vec<EventView> {
        let of_ip = self.past.iter().filter(|event| event.ip == Some(ip));
        of_ip.map(|event| EventView::clone(event)).collect()
    }

    pub fn followers(&self) -> usize {
        self.live.receiver_count()
    }
}

impl Default for EventLog {
    fn default() -> Self {
        Self::new(10_000)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::protocol::fixtures::event, *};

    #[test]
    fn forgets_the_oldest() {
        let mut log = EventLog::new(3);
        for number in 0..5 {
            log.push(event(&number.to_string()));
        }
        let reasons: Vec<_> = log
            .feed(false)
            .past
            .iter()
            .map(|e| e.reason.clone())
            .collect();
        assert_eq!(reasons, ["2", "3", "4"]);
        assert_eq!(log.history(Ipv4Addr::new(10, 0, 0, 7)).len(), 3);
        assert_eq!(log.history(Ipv4Addr::new(10, 0, 0, 8)).len(), 0);
    }

    #[test]
    fn past_and_live_meet_without_gap_or_overlap() {
        let mut log = EventLog::new(3);
        log.push(event("past"));
        let feed = log.feed(true);
        log.push(event("live"));
        assert_eq!(feed.past.len(), 1);
        assert_eq!(feed.live.unwrap().try_recv().unwrap().reason, "live");
    }
}
