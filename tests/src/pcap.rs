//! Capture files as tcpdump writes them: Ethernet, one record after another.
use std::{fs, path::Path};

use anyhow::{Context as _, Result, bail, ensure};

const MAGIC: u32 = 0xa1b2_c3d4;
const ETHERNET: u32 = 1;
const HEADER: usize = 24;
const RECORD: usize = 16;

/// The frames of a capture file, in order.
pub fn read(path: &Path) -> Result<Vec<Vec<u8>>> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    parse(&bytes).with_context(|| path.display().to_string())
}

fn parse(bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
    let word = |at: usize| -> Result<u32> {
        let four = bytes.get(at..at + 4).context("cut short")?;
        Ok(u32::from_le_bytes(four.try_into()?))
    };
    ensure!(word(0)? == MAGIC, "not a capture file of this byte order");
    ensure!(word(20)? == ETHERNET, "not of Ethernet frames");
    let mut frames = Vec::new();
    let mut at = HEADER;
    while at < bytes.len() {
        let (kept, length) = (word(at + 8)?, word(at + 12)?);
        if kept != length {
            bail!("frame {} was not kept whole", frames.len() + 1);
        }
        at += RECORD;
        let end = at + kept as usize;
        frames.push(bytes.get(at..end).context("cut short")?.to_vec());
        at = end;
    }
    Ok(frames)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A capture file of one frame, of which so many bytes were kept.
    fn file(frame: &[u8], kept: u32) -> Vec<u8> {
        let length = u32::try_from(frame.len()).unwrap();
        let words = [
            MAGIC,
            0x0004_0002,
            0,
            0,
            65_535,
            ETHERNET,
            7,
            0,
            kept,
            length,
        ];
        let mut bytes: Vec<_> = words.into_iter().flat_map(u32::to_le_bytes).collect();
        bytes.extend(frame);
        bytes
    }

    #[test]
    fn frames_are_read_whole_or_not_at_all() {
        let whole = file(&[1; 60], 60);
        assert_eq!(parse(&whole).unwrap(), [vec![1; 60]]);
        assert!(parse(&whole[..whole.len() - 1]).is_err());
        assert!(parse(&whole[..HEADER + RECORD - 1]).is_err());
        assert!(parse(&file(&[1; 60], 59)).is_err());
        assert_eq!(parse(&whole[..HEADER]).unwrap(), Vec::<Vec<u8>>::new());
    }
}
