//! Where scenes play: the proxies, the sign to stop, and connections whose every wait ends.

use std::{
    collections::VecDeque,
    io::Write,
    net::{Shutdown, TcpStream},
    sync::{
        Condvar, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use redis::{FromRedisValue, Value};

/// Works until the stage is closed, checks what came of it, and says how many rounds it did.
pub(crate) type Scene = fn(&Stage) -> anyhow::Result<u64>;

/// Keys that end so are on different shards, when there are two.
pub(crate) const SHARDS: [&str; 2] = ["{a}", "{b}"];
/// Longer than the longest hold of a proxy, on a machine that has other work.
pub(crate) const REPLY_LIMIT: Duration = Duration::from_secs(15);
const PAUSE: Duration = Duration::from_millis(5);
/// Frames that were read and not yet looked at; beyond it the socket's window says stop.
const FRAMES_MAX: usize = 10_000;

#[derive(Debug)]
pub(crate) struct Stage {
    proxies: Vec<String>,
    closed: Mutex<bool>,
    closing: Condvar,
}

impl Stage {
    pub(crate) fn new(proxies: &[String]) -> Self {
        Self {
            proxies: proxies.to_vec(),
            closed: Mutex::new(false),
            closing: Condvar::new(),
        }
    }

    pub(crate) fn close(&self) {
        *self.closed() = true;
        self.closing.notify_all();
    }

    pub(crate) fn is_open(&self) -> bool {
        !*self.closed()
    }

    /// Between two requests, so that the scenes leave some of the machine to the mesh. Ends early
    /// when the stage is closed.
    pub(crate) fn pause(&self) {
        let waited = self
            .closing
            .wait_timeout_while(self.closed(), PAUSE, |closed| !*closed);
        drop(waited);
    }

    fn closed(&self) -> MutexGuard<'_, bool> {
        self.closed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A client of one of the proxies, in RESP2.
    pub(crate) fn link(&self, number: usize) -> anyhow::Result<Link> {
        Link::open(&self.proxies[number % self.proxies.len()])
    }

    /// The same in RESP3.
    pub(crate) fn link3(&self, number: usize) -> anyhow::Result<Link> {
        let mut link = self.link(number)?;
        let _: Value = link.ask("HELLO 3")?;
        Ok(link)
    }
}

/// Runs parts of a scene side by side; all end, and the first error is the scene's.
pub(crate) fn together<T: Send>(
    parts: Vec<Box<dyn FnOnce() -> anyhow::Result<T> + Send + '_>>,
) -> anyhow::Result<Vec<T>> {
    thread::scope(|scope| {
        let running: Vec<_> = parts.into_iter().map(|part| scope.spawn(part)).collect();
        let ended: Vec<_> = running.into_iter().map(|r| r.join()).collect();
        let results = ended.into_iter().map(|ended| match ended {
            Ok(result) => result,
            Err(_) => bail!("a part of the scene panicked"),
        });
        results.collect()
    })
}

/// One connection. A thread reads it, so that waiting for a frame never cuts one in two.
#[derive(Debug)]
pub(crate) struct Link {
    socket: TcpStream,
    frames: Receiver<redis::RedisResult<Value>>,
    pushes: VecDeque<Value>,
}

impl Link {
    fn open(address: &str) -> anyhow::Result<Self> {
        let socket = TcpStream::connect(address).with_context(|| format!("connect {address}"))?;
        socket.set_nodelay(true)?;
        socket.set_write_timeout(Some(REPLY_LIMIT))?;
        let (sender, frames) = sync_channel(FRAMES_MAX);
        let reader = socket.try_clone()?;
        // It ends when the socket does, at the latest when the link is dropped.
        thread::spawn(move || read_frames(reader, &sender));
        Ok(Self {
            socket,
            frames,
            pushes: VecDeque::new(),
        })
    }

    /// Sends one command, whose words have spaces between; its reply is asked for later.
    pub(crate) fn send(&mut self, command: &str) -> anyhow::Result<()> {
        self.send_words(&command.split(' ').collect::<Vec<_>>())
    }

    fn send_words(&mut self, words: &[&str]) -> anyhow::Result<()> {
        let mut packed = redis::cmd(words[0]);
        for word in &words[1..] {
            packed.arg(word);
        }
        self.socket.write_all(&packed.get_packed_command())?;
        Ok(())
    }

    /// Sends one command, whose words have spaces between, and reads its reply; an error reply is an
    /// error.
    pub(crate) fn ask<T: FromRedisValue>(&mut self, command: &str) -> anyhow::Result<T> {
        self.ask_words(&command.split(' ').collect::<Vec<_>>())
    }

    pub(crate) fn ask_words<T: FromRedisValue>(&mut self, words: &[&str]) -> anyhow::Result<T> {
        self.send_words(words)?;
        self.reply()
            .with_context(|| format!("{words:?} from {:?}", self.socket.local_addr()))
    }

    /// The next frame that is not a push.
    pub(crate) fn reply<T: FromRedisValue>(&mut self) -> anyhow::Result<T> {
        let deadline = Instant::now() + REPLY_LIMIT;
        loop {
            match self.frame(deadline.saturating_duration_since(Instant::now()))? {
                Some(push @ Value::Push { .. }) => self.pushes.push_back(push),
                Some(value) => return Ok(redis::from_redis_value(value.extract_error()?)?),
                None => bail!("no reply in {REPLY_LIMIT:?}"),
            }
        }
    }

    /// A push that came, or comes in time.
    pub(crate) fn push(&mut self, limit: Duration) -> anyhow::Result<Option<Value>> {
        match self.pushes.pop_front() {
            Some(push) => Ok(Some(push)),
            None => self.frame(limit),
        }
    }

    /// The next push must be of this kind, such as `message`.
    pub(crate) fn expect_push(&mut self, kind: &str) -> anyhow::Result<()> {
        match self.push(REPLY_LIMIT)? {
            Some(Value::Push { kind: came, .. }) if came.to_string() == kind => Ok(()),
            other => bail!("{other:?} came, not a push of kind {kind}"),
        }
    }

    /// The next frame of any kind, if one comes in time.
    pub(crate) fn frame(&mut self, limit: Duration) -> anyhow::Result<Option<Value>> {
        match self.frames.recv_timeout(limit) {
            Ok(frame) => Ok(Some(frame.context("read")?)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => bail!("the proxy closed the connection"),
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

fn read_frames(mut socket: TcpStream, frames: &SyncSender<redis::RedisResult<Value>>) {
    let mut parser = redis::Parser::new();
    loop {
        let frame = parser.parse_value(&mut socket);
        // An error reply is a frame; an error here is the socket's, or bytes that are no frame.
        let is_over = frame.is_err();
        if frames.send(frame).is_err() || is_over {
            return;
        }
    }
}
