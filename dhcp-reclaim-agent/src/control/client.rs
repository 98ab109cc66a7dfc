//! The CLI's side of the control socket.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{
    ErrorCode, PROTOCOL, Request, Response,
    protocol::{Line, LineError, read_line},
};

/// Far above any answer of ours; a peer that is not an agent must not fill our memory.
const LINE_MAX: u64 = 16 << 20;
/// Above the agent's own patience with its loop.
const PATIENCE: Duration = Duration::from_secs(15);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("no agent is running here (control socket {})", .0.display())]
    NoAgent(PathBuf),
    #[error("may not talk to the agent at {}: run this as root", .0.display())]
    Denied(PathBuf),
    #[error("cannot talk to the agent at {}", path.display())]
    Connect { path: PathBuf, source: io::Error },
    #[error("the agent does not answer")]
    Broken(#[source] io::Error),
    #[error("the agent went away in the middle of its answer")]
    CutOff,
    #[error("the agent answers in another language: are the versions of both the same?")]
    Language(#[source] serde_json::Error),
    #[error("the agent speaks version {0} of the control protocol; this is version {PROTOCOL}")]
    Version(u32),
    #[error("{message}")]
    Agent { code: ErrorCode, message: String },
}

/// A connection, good for one request.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
}

impl Client {
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                ClientError::NoAgent(path.to_owned())
            }
            io::ErrorKind::PermissionDenied => ClientError::Denied(path.to_owned()),
            _ => ClientError::Connect {
                path: path.to_owned(),
                source,
            },
        })?;
        Ok(Self { stream })
    }

    /// The lines of the answer, without the last, `end`.
    pub fn ask(&mut self, request: &Request) -> Result<Answers<'_>, ClientError> {
        // Events may be far between.
        let following = matches!(request, Request::Events { follow: true });
        let patience = if following { None } else { Some(PATIENCE) };
        self.stream
            .set_read_timeout(patience)
            .map_err(ClientError::Broken)?;
        self.stream
            .set_write_timeout(Some(PATIENCE))
            .map_err(ClientError::Broken)?;
        let mut line = serde_json::to_string(&Line {
            v: PROTOCOL,
            body: request,
        })
        .map_err(ClientError::Language)?;
        line.push('\n');
        match (&self.stream).write_all(line.as_bytes()) {
            // Turned away at once: the answer says why.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            written => written.map_err(ClientError::Broken)?,
        }
        Ok(Answers {
            input: BufReader::new(&self.stream),
            done: false,
        })
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _closed = self.stream.shutdown(Shutdown::Both);
    }
}

/// An answer, line by line; ends after the first error.
#[derive(Debug)]
pub struct Answers<'a> {
    input: BufReader<&'a UnixStream>,
    done: bool,
}

impl Answers<'_> {
    fn read(&mut self) -> Result<Option<Response>, ClientError> {
        let mut line = Vec::new();
        (&mut self.input)
            .take(LINE_MAX)
            .read_until(b'\n', &mut line)
            .map_err(ClientError::Broken)?;
        if line.last() != Some(&b'\n') {
            return Err(ClientError::CutOff);
        }
        let answer = read_line(&line).map_err(|error| match error {
            LineError::Version(version) => ClientError::Version(version),
            LineError::Json(error) => ClientError::Language(error),
        })?;
        match answer {
            Response::End => Ok(None),
            Response::Error { code, message } => Err(ClientError::Agent { code, message }),
            answer @ (Response::Binding(_)
            | Response::Explain(_)
            | Response::Event(_)
            | Response::Imported(_)
            | Response::Lost { .. }
            | Response::Stats(_)
            | Response::Paused(_)
            | Response::Resumed(_)
            | Response::Probed(_)
            | Response::Release(_)) => Ok(Some(answer)),
        }
    }
}

impl Iterator for Answers<'_> {
    type Item = Result<Response, ClientError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let read = self.read();
        self.done = !matches!(read, Ok(Some(_)));
        read.transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_socket_is_no_agent() {
        let error = Client::connect(Path::new("/nonexistent/control.sock")).unwrap_err();
        assert!(matches!(error, ClientError::NoAgent(_)), "{error}");
    }

    fn answer(bytes: &[u8]) -> Vec<Result<Response, ClientError>> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (&theirs).write_all(bytes).unwrap();
        theirs.shutdown(Shutdown::Write).unwrap();
        let mut client = Client { stream: ours };
        client.ask(&Request::List).unwrap().collect()
    }

    #[test]
    fn answers_that_are_not_whole_are_errors() {
        assert!(matches!(answer(b"").as_slice(), [Err(ClientError::CutOff)]));
        assert!(matches!(
            answer(b"{\"v\":1,").as_slice(),
            [Err(ClientError::CutOff)]
        ));
        assert!(matches!(
            answer(b"hello\n").as_slice(),
            [Err(ClientError::Language(_))]
        ));
        let next = answer(b"{\"v\":2,\"kind\":\"end\"}\n");
        assert!(matches!(next.as_slice(), [Err(ClientError::Version(2))]));
        assert!(answer(b"{\"v\":1,\"kind\":\"end\"}\n").is_empty());
    }
}
