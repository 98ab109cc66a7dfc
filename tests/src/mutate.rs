//! Frames bent in every way that matters to whoever reads DHCP, from a seed: the same each time.

/// Longer than what is looked at, and what a test run in the kernel takes.
pub const LONGEST: usize = 3000;

pub struct Mutator<'a> {
    random: XorShift,
    seeds: &'a [Vec<u8>],
}

/// Option codes that mean something to us, and the two without a length.
const CODES: [u8; 13] = [0, 50, 51, 52, 53, 54, 58, 59, 61, 80, 82, 12, 255];
const BYTES: [u8; 12] = [0, 1, 2, 3, 4, 5, 6, 7, 127, 128, 254, 255];

impl<'a> Mutator<'a> {
    /// # Panics
    ///
    /// Without seeds.
    pub fn new(seed: u64, seeds: &'a [Vec<u8>]) -> Self {
        assert!(!seeds.is_empty(), "nothing to mutate");
        // Neighbouring seeds must not give neighbouring streams, and zero gives none.
        let seed = seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        Self {
            random: XorShift(seed),
            seeds,
        }
    }

    /// Writes the next mutant over `frame`.
    pub fn next(&mut self, frame: &mut Vec<u8>) {
        frame.clear();
        frame.extend(&self.seeds[self.random.below(self.seeds.len())]);
        for _ in 0..=self.random.below(5) {
            self.bend(frame);
        }
        frame.truncate(LONGEST);
        // Most lengths come true again: else nearly all ends at the first look at them.
        if self.random.below(8) != 0 {
            true_lengths(frame);
        }
    }

    pub fn below(&mut self, bound: usize) -> usize {
        self.random.below(bound)
    }

    fn bend(&mut self, frame: &mut Vec<u8>) {
        let len = frame.len();
        let random = &mut self.random;
        let options = options_at(frame);
        // Where the options are, more often than not.
        let at = match options {
            Some(from) if from < len && random.below(4) != 0 => from + random.below(len - from),
            _ => random.below(len.max(1)),
        };
        match random.below(12) {
            _ if len == 0 => frame.push(random.byte()),
            0 => frame[at] = random.byte(),
            1 => frame[at] = BYTES[random.below(BYTES.len())],
            2 => frame[at] ^= 1 << random.below(8),
            3 => {
                let end = (at + 1 + random.below(64)).min(len);
                frame.drain(at..end);
            }
            4 => frame.truncate(at),
            5 => {
                let more = random.below(300);
                let byte = random.byte();
                frame.extend(std::iter::repeat_n(byte, more));
            }
            6..=8 => {
                let option = random.option();
                frame.splice(at..at, option);
            }
            9 => {
                // A piece of itself or of another, at another place.
                let other = &self.seeds[random.below(self.seeds.len())];
                let from = random.below(other.len().max(1));
                let to = (from + random.below(120)).min(other.len());
                frame.splice(at..at, other[from..to].iter().copied());
            }
            10 => {
                let tpid: [u8; 2] = [[0x81, 0], [0x88, 0xa8], [0x91, 0]][random.below(3)];
                let tag = [tpid[0], tpid[1], random.byte(), random.byte()];
                frame.splice(12.min(len)..12.min(len), tag);
            }
            _ => {
                // The options begin anew: `file` and `sname` too may have some.
                let Some(from) = options.filter(|from| *from < len) else {
                    return;
                };
                let area = [from, from - 132, from - 196][random.below(3)];
                let mut at = area;
                for _ in 0..random.below(12) {
                    for byte in random.option() {
                        if let Some(place) = frame.get_mut(at) {
                            *place = byte;
                        }
                        at += 1;
                    }
                }
            }
        }
    }
}

/// Where the options of a whole DHCP message begin: behind tags, the IP header and the cookie.
fn options_at(frame: &[u8]) -> Option<usize> {
    let (_, udp) = headers(frame)?;
    Some(udp + 8 + 240)
}

/// Where the IP and the UDP header begin.
fn headers(frame: &[u8]) -> Option<(usize, usize)> {
    let mut at = 12;
    while matches!(frame.get(at..at + 2)?, [0x81 | 0x91, 0] | [0x88, 0xa8]) {
        at += 4;
    }
    let ip = at + 2;
    let words = frame.get(ip)? & 15;
    Some((ip, ip + usize::from(words) * 4))
}

/// Has the IP and the UDP length say what is there.
fn true_lengths(frame: &mut [u8]) {
    let Some((ip, udp)) = headers(frame) else {
        return;
    };
    for (start, field) in [(ip, ip + 2), (udp, udp + 4)] {
        let len = frame.len().saturating_sub(start);
        let Ok(len) = u16::try_from(len) else {
            return;
        };
        if let Some(place) = frame.get_mut(field..field + 2) {
            place.copy_from_slice(&len.to_be_bytes());
        }
    }
}

struct XorShift(u64);

impl XorShift {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: usize) -> usize {
        ((self.next() >> 16) % bound as u64) as usize
    }

    fn byte(&mut self) -> u8 {
        (self.next() >> 24) as u8
    }

    /// An option, mostly of a good length.
    fn option(&mut self) -> Vec<u8> {
        let code = CODES[self.below(CODES.len())];
        if matches!(code, 0 | 255) {
            return vec![code];
        }
        let fits = match code {
            50 | 51 | 54 | 58 | 59 => 4,
            52 | 53 => 1,
            80 => 0,
            _ => self.below(20),
        };
        let len = if self.below(6) == 0 {
            self.below(256)
        } else {
            fits
        };
        // Small numbers are types of messages, and bits of the overload.
        let base = if code == 52 || code == 53 {
            (self.below(8)) as u8
        } else {
            self.byte()
        };
        let mut option = vec![code, len as u8];
        option.extend((0..len).map(|n| base.wrapping_add(n as u8)));
        if self.below(20) == 0 {
            option.truncate(1 + self.below(option.len()));
        }
        option
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_mutants() {
        let seeds = [vec![7; 300], vec![1, 2, 3], vec![]];
        let draw = |seed| {
            let mut mutator = Mutator::new(seed, &seeds);
            let mut frame = Vec::new();
            let mut all = Vec::new();
            for _ in 0..1000 {
                mutator.next(&mut frame);
                assert!(frame.len() <= LONGEST);
                all.push(frame.clone());
            }
            all
        };
        assert_eq!(draw(0), draw(0));
        assert_ne!(draw(0), draw(1));
    }
}
