//! The agent's side of the control socket.

use std::{
    fs, io,
    net::Ipv4Addr,
    os::unix::{
        fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt},
        net::UnixStream as BlockingStream,
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use nix::fcntl::{Flock, FlockArg};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{
        UnixListener, UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{Semaphore, broadcast, mpsc, oneshot},
    time::{sleep, timeout},
};
use tracing::{debug, warn};

use super::{
    BindingView, ErrorCode, EventFeed, ExplainView, Order, Ordered, PROTOCOL, Peer, REASON_MAX,
    Request, Response, StatsView, json_line,
    protocol::{Line, read_line},
};

/// Places in the queue from clients to the agent's loop.
pub const REQUEST_QUEUE: usize = 64;

const CLIENTS_MAX: usize = 64;
const REQUEST_MAX: u64 = 64 << 10;
/// A client asks at once, or not at all.
const REQUEST_PATIENCE: Duration = Duration::from_secs(5);
/// The loop answers between two events.
const REPLY_PATIENCE: Duration = Duration::from_secs(10);
/// A client that reads nothing for this long has gone.
const WRITE_PATIENCE: Duration = Duration::from_secs(10);

/// What a client wants of the agent's loop, which answers by `reply`. A client that has gone away
/// shows as a reply that cannot be sent; nothing needs to be done about it.
#[derive(Debug)]
pub enum ControlRequest {
    List {
        reply: oneshot::Sender<Vec<BindingView>>,
    },
    /// Every binding of the address, on whatever segment and VLAN; none is "not found".
    Explain {
        ip: Ipv4Addr,
        reply: oneshot::Sender<Vec<ExplainView>>,
    },
    Events {
        follow: bool,
        reply: oneshot::Sender<EventFeed>,
    },
    Stats {
        reply: oneshot::Sender<StatsView>,
    },
    Order(Ordered),
}

/// Why the control socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    #[error("another agent is already here (control socket {} answers)", .0.display())]
    InUse(PathBuf),
    #[error("{} is there and is no socket: give another path with --control, or remove it", .0.display())]
    NotASocket(PathBuf),
    #[error("cannot make {}", path.display())]
    Directory { path: PathBuf, source: io::Error },
    #[error("cannot make the control socket {}", path.display())]
    Socket { path: PathBuf, source: io::Error },
}

/// Counters of the server.
#[derive(Debug, Default)]
pub struct ControlStats {
    pub accepted: AtomicU64,
    /// Turned away: too many clients.
    pub refused: AtomicU64,
    /// Followers that were cut off because they read too slowly.
    pub slow: AtomicU64,
    /// Events that they missed.
    pub events_lost: AtomicU64,
}

/// The control socket; its file goes when this is dropped.
#[derive(Debug)]
pub struct ControlServer {
    listener: UnixListener,
    file: SocketFile,
    /// Whose agent it is. Asked once: later there may be no right to ask.
    owner: u32,
    stats: Arc<ControlStats>,
}

impl ControlServer {
    /// Takes the socket at `path`, replacing one that nobody listens on any more.
    pub fn bind(path: &Path) -> Result<Self, BindError> {
        let directory = path.parent().unwrap_or(Path::new("/"));
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(directory)
            .map_err(|source| BindError::Directory {
                path: directory.to_owned(),
                source,
            })?;
        let failed = |source| BindError::Socket {
            path: path.to_owned(),
            source,
        };
        // Two agents that start at once must not both find the same dead socket.
        let lock = fs::File::open(directory).map_err(failed)?;
        let _lock = Flock::lock(lock, FlockArg::LockExclusive)
            .map_err(|(_, errno)| failed(errno.into()))?;
        check_free(path)?;

        // Made beside its place and moved there once only root may connect: no moment in between,
        // and no umask to change for the whole process.
        let mut fresh = path.as_os_str().to_owned();
        fresh.push(format!(".{}", std::process::id()));
        let fresh = PathBuf::from(fresh);
        remove_if_there(&fresh).map_err(failed)?;
        let listener = UnixListener::bind(&fresh).map_err(failed)?;
        let placed = fs::set_permissions(&fresh, fs::Permissions::from_mode(0o600))
            .and_then(|()| fs::rename(&fresh, path))
            .and_then(|()| SocketFile::new(path));
        match placed {
            Ok(file) => Ok(Self {
                listener,
                file,
                owner: nix::unistd::geteuid().as_raw(),
                stats: Arc::default(),
            }),
            Err(source) => {
                let _left = fs::remove_file(&fresh);
                Err(failed(source))
            }
        }
    }

    pub fn path(&self) -> &Path {
        &self.file.path
    }

    pub fn stats(&self) -> Arc<ControlStats> {
        Arc::clone(&self.stats)
    }

    /// Serves until `requests` is closed. Spawn it; dropping it closes the socket.
    pub async fn run(self, requests: mpsc::Sender<ControlRequest>) {
        let places = Arc::new(Semaphore::new(CLIENTS_MAX));
        loop {
            let accepted = tokio::select! {
                () = requests.closed() => return,
                accepted = self.listener.accept() => accepted,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors, mostly: clients leave, and then there is one.
                    warn!(%error, "control client not accepted");
                    sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
                self.stats.refused.fetch_add(1, Ordering::Relaxed);
                refuse(&stream);
                continue;
            };
            self.stats.accepted.fetch_add(1, Ordering::Relaxed);
            let (requests, stats, owner) = (requests.clone(), Arc::clone(&self.stats), self.owner);
            tokio::spawn(async move {
                let _place = place;
                let (input, output) = stream.into_split();
                let mut client = Client {
                    input,
                    output,
                    owner,
                    stats,
                };
                if let Err(error) = client.serve(&requests).await {
                    debug!(%error, "control client left");
                }
            });
        }
    }
}

/// Without waiting: who was turned away may not hold anything up.
fn refuse(stream: &UnixStream) {
    let message = format!("{CLIENTS_MAX} clients are connected already; try again later");
    let body = Response::Error {
        code: ErrorCode::Busy,
        message,
    };
    if let Ok(mut line) = json_line(&Line { v: PROTOCOL, body }) {
        line.push('\n');
        let _unsent = stream.try_write(line.as_bytes());
    }
}

fn check_free(path: &Path) -> Result<(), BindError> {
    let failed = |source| BindError::Socket {
        path: path.to_owned(),
        source,
    };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(BindError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    match BlockingStream::connect(path) {
        Ok(_) => Err(BindError::InUse(path.to_owned())),
        // Nobody listens: left by an agent that was killed.
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // EAGAIN: somebody does, with a full queue.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            Err(BindError::InUse(path.to_owned()))
        }
        Err(error) => Err(failed(error)),
    }
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Removes the socket's file, unless it is another agent's by now.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    fn new(path: &Path) -> io::Result<Self> {
        let found = fs::symlink_metadata(path)?;
        Ok(Self {
            path: path.to_owned(),
            identity: (found.dev(), found.ino()),
        })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let Ok(found) = fs::symlink_metadata(&self.path) else {
            return;
        };
        if (found.dev(), found.ino()) == self.identity {
            let _gone = fs::remove_file(&self.path);
        }
    }
}

struct Client {
    input: OwnedReadHalf,
    output: OwnedWriteHalf,
    owner: u32,
    stats: Arc<ControlStats>,
}

impl Client {
    async fn serve(&mut self, requests: &mpsc::Sender<ControlRequest>) -> io::Result<()> {
        let request = match self.read_request().await? {
            Ok(request) => request,
            Err(message) => return self.error(ErrorCode::BadRequest, message).await,
        };
        match request {
            Request::List => {
                let Some(bindings) = self
                    .ask(requests, |reply| ControlRequest::List { reply })
                    .await?
                else {
                    return Ok(());
                };
                for binding in bindings {
                    self.send(Response::Binding(binding)).await?;
                }
            }
            Request::Explain { ip } => {
                let Some(views) = self
                    .ask(requests, |reply| ControlRequest::Explain { ip, reply })
                    .await?
                else {
                    return Ok(());
                };
                if views.is_empty() {
                    let message = format!("{ip} is not known here");
                    return self.error(ErrorCode::NotFound, message).await;
                }
                for view in views {
                    self.send(Response::Explain(view)).await?;
                }
            }
            Request::Events { follow } => {
                let Some(feed) = self
                    .ask(requests, |reply| ControlRequest::Events { follow, reply })
                    .await?
                else {
                    return Ok(());
                };
                self.events(feed).await?;
            }
            Request::Stats => {
                let Some(stats) = self
                    .ask(requests, |reply| ControlRequest::Stats { reply })
                    .await?
                else {
                    return Ok(());
                };
                self.send(Response::Stats(stats)).await?;
            }
            Request::Import(import) => {
                return self.order(requests, Order::Import(import)).await;
            }
            Request::Pause { reason } => {
                return self.order(requests, Order::Pause { reason }).await;
            }
            Request::Resume => return self.order(requests, Order::Resume).await,
            Request::Probe(which) => return self.order(requests, Order::Probe(which)).await,
            Request::Release { which, force } => {
                return self.order(requests, Order::Release { which, force }).await;
            }
        }
        self.send(Response::End).await
    }

    /// What changes something is for root, and for whoever owns the agent: the socket's mode may have
    /// been widened for those who look.
    async fn order(
        &mut self,
        requests: &mpsc::Sender<ControlRequest>,
        order: Order,
    ) -> io::Result<()> {
        let by = self.output.as_ref().peer_cred()?;
        let by = Peer {
            uid: by.uid(),
            pid: by.pid().unwrap_or(0),
        };
        if by.uid != 0 && by.uid != self.owner {
            let message = "only root, and the user that the agent runs as, may do this";
            return self.error(ErrorCode::Denied, message).await;
        }
        if let Order::Pause {
            reason: Some(reason),
        } = &order
            && reason.len() > REASON_MAX
        {
            let message = format!("a reason of at most {REASON_MAX} bytes");
            return self.error(ErrorCode::BadRequest, message).await;
        }
        let answer = self
            .ask(requests, |reply| {
                ControlRequest::Order(Ordered { order, by, reply })
            })
            .await?;
        match answer {
            None => Ok(()),
            Some(Err(refusal)) => self.error(refusal.code, refusal.message).await,
            Some(Ok(lines)) => {
                for line in lines {
                    self.send(line).await?;
                }
                self.send(Response::End).await
            }
        }
    }

    /// The request, or what is wrong with it.
    async fn read_request(&mut self) -> io::Result<Result<Request, String>> {
        let mut line = Vec::new();
        let mut input = BufReader::new((&mut self.input).take(REQUEST_MAX + 1));
        match timeout(REQUEST_PATIENCE, input.read_until(b'\n', &mut line)).await {
            Ok(read) => read?,
            Err(_) => return Ok(Err("no request came in time".to_owned())),
        };
        if line.last() != Some(&b'\n') {
            return Ok(Err(format!(
                "no request line of at most {REQUEST_MAX} bytes"
            )));
        }
        Ok(read_line(&line).map_err(|error| error.to_string()))
    }

    /// The loop's answer; `None` once the client was told that there is none.
    async fn ask<T>(
        &mut self,
        requests: &mpsc::Sender<ControlRequest>,
        request: impl FnOnce(oneshot::Sender<T>) -> ControlRequest,
    ) -> io::Result<Option<T>> {
        let (reply, answer) = oneshot::channel();
        let asked = async {
            requests.send(request(reply)).await.ok()?;
            answer.await.ok()
        };
        match timeout(REPLY_PATIENCE, asked).await {
            Ok(Some(answer)) => return Ok(Some(answer)),
            Ok(None) => {
                self.error(ErrorCode::Unavailable, "the agent is stopping")
                    .await?
            }
            Err(_) => {
                self.error(ErrorCode::Unavailable, "the agent is busy; try again")
                    .await?
            }
        }
        Ok(None)
    }

    async fn events(&mut self, feed: EventFeed) -> io::Result<()> {
        for event in feed.past {
            self.send(Response::Event(event.as_ref().clone())).await?;
        }
        let Some(mut live) = feed.live else {
            return Ok(());
        };
        loop {
            // A follower has nothing to say: what it sends is thrown away, and its end is the end.
            let mut idle = [0; 64];
            let received = tokio::select! {
                read = self.input.read(&mut idle) => {
                    if read? == 0 {
                        return Ok(());
                    }
                    continue;
                }
                received = live.recv() => received,
            };
            match received {
                Ok(event) => self.send(Response::Event(event.as_ref().clone())).await?,
                Err(broadcast::error::RecvError::Closed) => return Ok(()),
                Err(broadcast::error::RecvError::Lagged(count)) => {
                    self.stats.slow.fetch_add(1, Ordering::Relaxed);
                    self.stats.events_lost.fetch_add(count, Ordering::Relaxed);
                    return self.send(Response::Lost { count }).await;
                }
            }
        }
    }

    async fn error(&mut self, code: ErrorCode, message: impl Into<String>) -> io::Result<()> {
        self.send(Response::Error {
            code,
            message: message.into(),
        })
        .await
    }

    async fn send(&mut self, body: Response) -> io::Result<()> {
        let mut line = json_line(&Line { v: PROTOCOL, body })?;
        line.push('\n');
        match timeout(WRITE_PATIENCE, self.output.write_all(line.as_bytes())).await {
            Ok(written) => written,
            Err(elapsed) => {
                self.stats.slow.fetch_add(1, Ordering::Relaxed);
                Err(elapsed.into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader, Read, Write},
        thread,
    };

    use super::{
        super::{
            Client as Asker, ClientError, EventLog, Refusal,
            protocol::fixtures::{binding, event},
        },
        *,
    };

    /// A directory of its own, gone at the end.
    struct Directory(PathBuf);

    impl Directory {
        fn new(name: &str) -> Self {
            let path =
                std::env::temp_dir().join(format!("dhcp-reclaim-{name}-{}", std::process::id()));
            let _old = fs::remove_dir_all(&path);
            Self(path)
        }

        fn socket(&self) -> PathBuf {
            self.0.join("run/control.sock")
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _gone = fs::remove_dir_all(&self.0);
        }
    }

    /// Runs a server with a loop that knows one binding; `test` talks to it from a thread.
    fn with_agent(name: &str, test: impl FnOnce(&Path) + Send + 'static) -> Arc<ControlStats> {
        let directory = Directory::new(name);
        let path = directory.socket();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let server = ControlServer::bind(&path).unwrap();
            let stats = server.stats();
            let (sender, mut requests) = mpsc::channel(REQUEST_QUEUE);
            let serving = tokio::spawn(server.run(sender));
            let mut log = EventLog::new(100);
            log.push(event("first"));
            let talking_to = path.clone();
            let mut talk = tokio::task::spawn_blocking(move || test(&talking_to));
            let mut tick = tokio::time::interval(Duration::from_millis(5));
            loop {
                let request = tokio::select! {
                    done = &mut talk => break done.unwrap(),
                    _ = tick.tick() => {
                        if log.followers() > 0 {
                            // More than a follower's queue, for one that does not read.
                            for _ in 0..400 {
                                log.push(event(&"x".repeat(500)));
                            }
                        }
                        continue;
                    }
                    request = requests.recv() => request.unwrap(),
                };
                match request {
                    ControlRequest::List { reply } => reply.send(vec![binding(); 3]).unwrap(),
                    ControlRequest::Explain { reply, .. } => reply.send(Vec::new()).unwrap(),
                    ControlRequest::Events { follow, reply } => {
                        reply.send(log.feed(follow)).unwrap();
                    }
                    // Dropped: an agent that is stopping.
                    ControlRequest::Stats { reply } => drop(reply),
                    ControlRequest::Order(Ordered { order, by, reply }) => {
                        assert_eq!(by.uid, nix::unistd::geteuid().as_raw());
                        assert_eq!(order, Order::Resume);
                        let refusal = Refusal::new(ErrorCode::NotFound, "nothing to resume");
                        reply.send(Err(refusal)).unwrap();
                    }
                }
            }
            drop(requests);
            serving.await.unwrap();
            assert!(!path.exists(), "the socket is removed");
            stats
        })
    }

    fn say(path: &Path, line: &[u8]) -> String {
        let mut stream = BlockingStream::connect(path).unwrap();
        stream.write_all(line).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn answers_and_errors() {
        with_agent("answers", |path| {
            assert_eq!(
                fs::metadata(path).unwrap().permissions().mode() & 0o777,
                0o600
            );
            let parent = fs::metadata(path.parent().unwrap()).unwrap();
            assert_eq!(parent.permissions().mode() & 0o777, 0o755);

            let mut asker = Asker::connect(path).unwrap();
            let answers: Result<Vec<_>, _> = asker.ask(&Request::List).unwrap().collect();
            assert_eq!(answers.unwrap(), vec![Response::Binding(binding()); 3]);

            let ip = Ipv4Addr::new(10, 9, 9, 9);
            let mut asker = Asker::connect(path).unwrap();
            let mut answers = asker.ask(&Request::Explain { ip }).unwrap();
            let error = answers.next().unwrap().unwrap_err();
            assert!(matches!(
                &error,
                ClientError::Agent {
                    code: ErrorCode::NotFound,
                    ..
                }
            ));
            assert_eq!(error.to_string(), "10.9.9.9 is not known here");

            let mut asker = Asker::connect(path).unwrap();
            let error = asker
                .ask(&Request::Stats)
                .unwrap()
                .next()
                .unwrap()
                .unwrap_err();
            assert!(matches!(
                error,
                ClientError::Agent {
                    code: ErrorCode::Unavailable,
                    ..
                }
            ));

            let mut asker = Asker::connect(path).unwrap();
            let error = asker
                .ask(&Request::Resume)
                .unwrap()
                .next()
                .unwrap()
                .unwrap_err();
            assert_eq!(error.to_string(), "nothing to resume");

            let mut asker = Asker::connect(path).unwrap();
            let reason = Some("x".repeat(REASON_MAX + 1));
            let error = asker
                .ask(&Request::Pause { reason })
                .unwrap()
                .next()
                .unwrap()
                .unwrap_err();
            assert_eq!(error.to_string(), "a reason of at most 200 bytes");

            let mut asker = Asker::connect(path).unwrap();
            let request = Request::Events { follow: false };
            let answers: Result<Vec<_>, _> = asker.ask(&request).unwrap().collect();
            assert_eq!(answers.unwrap(), [Response::Event(event("first"))]);
        });
    }

    #[test]
    fn nonsense_is_refused_with_a_reason() {
        with_agent("nonsense", |path| {
            for (line, part) in [
                (&b"hello\n"[..], "expected value"),
                (b"{\"v\":1,\"request\":\"sing\"}\n", "unknown variant"),
                (b"{\"v\":2,\"request\":\"list\"}\n", "version 2"),
                (b"{\"request\":\"list\"}\n", "missing field `v`"),
                (b"\xff\xff\n", "bad-request"),
            ] {
                let answer = say(path, line);
                assert!(answer.contains("\"bad-request\""), "{answer}");
                assert!(answer.contains(part), "{answer}");
            }
            // Answered before all of it is read; the rest meets a closed socket.
            let mut stream = BlockingStream::connect(path).unwrap();
            let _refused = stream.write_all(&vec![b'a'; 1 << 20]);
            let mut line = String::new();
            let _read = BufReader::new(stream).read_line(&mut line);
            assert!(line.is_empty() || line.contains("at most"), "{line}");
        });
    }

    #[test]
    fn a_follower_that_does_not_read_is_cut_off_and_told() {
        let stats = with_agent("slow", |path| {
            let mut asker = Asker::connect(path).unwrap();
            let mut answers = asker.ask(&Request::Events { follow: true }).unwrap();
            assert_eq!(
                answers.next().unwrap().unwrap(),
                Response::Event(event("first"))
            );
            thread::sleep(Duration::from_secs(1));
            let last = answers.map(Result::unwrap).last().unwrap();
            let Response::Lost { count } = last else {
                panic!("{last:?}")
            };
            assert!(count > 0);
        });
        assert_eq!(stats.slow.load(Ordering::Relaxed), 1);
        assert!(stats.events_lost.load(Ordering::Relaxed) > 0);
    }

    #[test]
    fn the_65th_client_is_turned_away() {
        let stats = with_agent("crowd", |path| {
            let crowd: Vec<_> = (0..CLIENTS_MAX)
                .map(|_| BlockingStream::connect(path).unwrap())
                .collect();
            // All are accepted in order, so the next is one too many.
            let mut asker = Asker::connect(path).unwrap();
            let error = asker
                .ask(&Request::List)
                .unwrap()
                .next()
                .unwrap()
                .unwrap_err();
            assert!(
                matches!(
                    error,
                    ClientError::Agent {
                        code: ErrorCode::Busy,
                        ..
                    }
                ),
                "{error}"
            );
            drop(crowd);
            // Their places are free once the server has seen them leave.
            let served = (0..100).any(|_| {
                thread::sleep(Duration::from_millis(50));
                let mut asker = Asker::connect(path).unwrap();
                asker
                    .ask(&Request::List)
                    .unwrap()
                    .all(|answer| answer.is_ok())
            });
            assert!(served);
        });
        assert!(stats.refused.load(Ordering::Relaxed) >= 1);
    }

    #[tokio::test]
    async fn a_live_socket_is_kept_and_a_dead_one_replaced() {
        let directory = Directory::new("stale");
        let path = directory.socket();
        let first = ControlServer::bind(&path).unwrap();
        let second = ControlServer::bind(&path).unwrap_err();
        assert_eq!(
            second.to_string(),
            format!(
                "another agent is already here (control socket {} answers)",
                path.display()
            )
        );

        // As after a kill: the file stays, nobody listens.
        let ControlServer { listener, file, .. } = first;
        drop(listener);
        std::mem::forget(file);
        assert!(path.exists());
        let third = ControlServer::bind(&path).unwrap();
        drop(third);
        assert!(!path.exists());

        fs::write(&path, "precious").unwrap();
        let fourth = ControlServer::bind(&path).unwrap_err();
        assert!(matches!(fourth, BindError::NotASocket(_)), "{fourth}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
        let left = fs::read_dir(path.parent().unwrap()).unwrap().count();
        assert_eq!(left, 1, "nothing else is left behind");
    }

    #[tokio::test]
    async fn a_successors_socket_is_left_alone() {
        let directory = Directory::new("successor");
        let path = directory.socket();
        let first = ControlServer::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let second = ControlServer::bind(&path).unwrap();
        drop(first);
        assert!(path.exists());
        drop(second);
    }
}
