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

/// Writes one; the times are those of nobody.
pub fn write(path: &Path, frames: &[Vec<u8>]) -> Result<()> {
    let mut bytes = Vec::new();
    for word in [MAGIC, 0x0004_0002, 0, 0, 65_535, ETHERNET] {
        bytes.extend(word.to_le_bytes());
    }
    for (second, frame) in (0_u32..).zip(frames) {
        let length = u32::try_from(frame.len())?;
        for word in [second, 0, length, length] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(frame);
    }
    fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
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

    #[test]
    fn what_is_written_is_read() {
        let file = std::env::temp_dir().join(format!("pcap-{}", std::process::id()));
        let frames = [vec![1; 60], vec![2; 1514], vec![]];
        write(&file, &frames).unwrap();
        assert_eq!(read(&file).unwrap(), frames);
        let mut bytes = fs::read(&file).unwrap();
        fs::remove_file(&file).unwrap();
        bytes.pop();
        bytes.truncate(bytes.len() - 17);
        assert!(parse(&bytes).is_err());
    }
}
