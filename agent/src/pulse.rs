//! Whether a process that lives also answers: a ping every 100 ms, on a connection of its own.
//!
//! Invariant: a process that only works hard is never called unresponsive. Five pings without an
//! answer are suspicious, but what counts then is what the kernel says of its main thread: stopped is
//! certain at once, asleep for seconds is a hang, and busy gets the time that a long script or a big
//! fork may take. Any answer clears it, a refusal too.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{
    io::AsyncWriteExt,
    net::UnixStream,
    sync::watch,
    task::AbortHandle,
    time::{Instant, MissedTickBehavior, interval, timeout},
};

use crate::process::Process;

const PING_EVERY: Duration = Duration::from_millis(100);
/// Five pings.
const MISSED: Duration = Duration::from_millis(500);
/// Waiting for a disk or for memory, or in a debugging command: longer than any of these should take.
const ASLEEP_MAX: Duration = Duration::from_secs(5);
/// Computing: a script of a client that the engine does not interrupt before 5 s.
const BUSY_MAX: Duration = Duration::from_secs(30);
/// Looks that are further apart say that this agent itself did not run; such a time proves nothing.
const LOOK_GAP_MAX: Duration = Duration::from_millis(300);

/// What the main thread of a process does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Thread {
    Stopped,
    Asleep,
    Busy,
}

/// The judgement, with no clock and no process.
#[derive(Debug, Clone, Copy)]
struct Judge {
    answered: Instant,
    /// When the thread was last seen at work, or the process answered.
    worked: Instant,
    looked: Instant,
}

impl Judge {
    fn new(now: Instant) -> Self {
        Self {
            answered: now,
            worked: now,
            looked: now,
        }
    }

    fn answered(&mut self, now: Instant) {
        *self = Self::new(now);
    }

    /// Whether the process is unresponsive.
    fn look(&mut self, thread: Option<Thread>, now: Instant) -> bool {
        if now.duration_since(self.looked) > LOOK_GAP_MAX {
            self.answered(now);
            return false;
        }
        self.looked = now;
        let silent = now.duration_since(self.answered);
        if thread == Some(Thread::Busy) {
            self.worked = now;
        }
        silent >= MISSED
            && match thread {
                // It has ended, which is noticed elsewhere.
                None => false,
                Some(Thread::Stopped) => true,
                Some(_) => silent >= BUSY_MAX || now.duration_since(self.worked) >= ASLEEP_MAX,
            }
    }
}

/// Watches one process until it is dropped.
#[derive(Debug)]
pub struct Pulse {
    process: Process,
    silent: watch::Receiver<Option<Instant>>,
    task: AbortHandle,
}

impl Drop for Pulse {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Pulse {
    /// `is_up`: the process runs for a while, so it has a socket.
    pub fn start(process: Process, socket: &Path, is_up: bool) -> Self {
        let (report, silent) = watch::channel(None);
        let task = tokio::spawn(watch_over(process, socket.to_owned(), is_up, report));
        let task = task.abort_handle();
        Self {
            process,
            silent,
            task,
        }
    }

    pub fn process(&self) -> Process {
        self.process
    }

    /// Since when the process is called unresponsive.
    pub fn silent_since(&self) -> Option<Instant> {
        *self.silent.borrow()
    }

    pub fn subscribe(&self) -> watch::Receiver<Option<Instant>> {
        self.silent.clone()
    }
}

/// Waits until what is known of a process differs from `known`.
///
/// # Cancel safety
/// Safe: it looks at a value, not at a notice.
pub async fn differs(pulse: Option<watch::Receiver<Option<Instant>>>, known: Option<Instant>) {
    let ended = match pulse {
        None => true,
        Some(mut pulse) => pulse.wait_for(|silent| *silent != known).await.is_err(),
    };
    if ended {
        std::future::pending().await
    }
}

async fn watch_over(
    process: Process,
    socket: PathBuf,
    is_up: bool,
    report: watch::Sender<Option<Instant>>,
) {
    let mut tick = interval(PING_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut connection: Option<UnixStream> = None;
    let mut judge = Judge::new(Instant::now());
    // Before its first answer a process is starting, and has no socket yet.
    let mut has_answered = is_up;
    loop {
        tick.tick().await;
        // The answer to the last ping is looked for before the time that it took.
        let answered = match &mut connection {
            None => false,
            Some(open) => match heard(open) {
                Heard::Answer => true,
                Heard::Nothing => false,
                Heard::End => {
                    connection = None;
                    false
                }
            },
        };
        let now = Instant::now();
        if answered {
            has_answered = true;
            judge.answered(now);
        } else if !has_answered {
            judge = Judge::new(now);
        }
        let silent = judge.look(thread_of(process), now);
        report.send_if_modified(|since| {
            let news = since.is_some() != silent;
            if news {
                *since = silent.then_some(now);
            }
            news
        });
        // One ping at a time: a process that comes back finds no queue of them.
        if answered || connection.is_none() {
            ping(&mut connection, &socket).await;
        }
    }
}

enum Heard {
    Answer,
    Nothing,
    End,
}

/// Without waiting.
fn heard(stream: &UnixStream) -> Heard {
    let mut bytes = [0; 256];
    match stream.try_read(&mut bytes) {
        Ok(0) => Heard::End,
        Ok(_) => Heard::Answer,
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Heard::Nothing,
        Err(_) => Heard::End,
    }
}

/// Not logged in, so a refusal is all that comes, from the same thread as everything else.
async fn ping(connection: &mut Option<UnixStream>, socket: &Path) {
    let exchange = async {
        if connection.is_none() {
            *connection = UnixStream::connect(socket).await.ok();
        }
        if let Some(open) = connection
            && open.write_all(b"PING\r\n").await.is_err()
        {
            *connection = None;
        }
    };
    // Both end at once, or the socket's queue is full.
    if timeout(PING_EVERY, exchange).await.is_err() {
        *connection = None;
    }
}

fn thread_of(process: Process) -> Option<Thread> {
    match process.state()? {
        'T' | 't' => Some(Thread::Stopped),
        'R' => Some(Thread::Busy),
        _ => Some(Thread::Asleep),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// After how long without an answer a process whose thread does that is called unresponsive.
    async fn called_after(thread: impl Fn(u64) -> Thread) -> Option<u64> {
        let mut now = Instant::now();
        let mut judge = Judge::new(now);
        for step in 1..=400u64 {
            now += PING_EVERY;
            if judge.look(Some(thread(step)), now) {
                return Some(step * 100);
            }
        }
        None
    }

    #[tokio::test]
    async fn stopped_is_certain_at_once_asleep_after_five_seconds_busy_after_thirty() {
        assert_eq!(called_after(|_| Thread::Stopped).await, Some(500));
        assert_eq!(called_after(|_| Thread::Asleep).await, Some(5_000));
        assert_eq!(called_after(|_| Thread::Busy).await, Some(30_000));
    }

    #[tokio::test]
    async fn a_busy_thread_that_waits_now_and_then_is_busy() {
        let mixed = |step: u64| match step.is_multiple_of(10) {
            true => Thread::Busy,
            false => Thread::Asleep,
        };
        assert_eq!(called_after(mixed).await, Some(30_000));
    }

    #[tokio::test]
    async fn an_answer_clears_it_and_a_time_in_which_nobody_looked_proves_nothing() {
        let mut now = Instant::now();
        let mut judge = Judge::new(now);
        for _ in 0..5 {
            now += PING_EVERY;
            judge.look(Some(Thread::Stopped), now);
        }
        assert!(judge.look(Some(Thread::Stopped), now));
        judge.answered(now);
        assert!(!judge.look(Some(Thread::Stopped), now));
        now += Duration::from_secs(60);
        assert!(!judge.look(Some(Thread::Asleep), now), "the agent was away");
    }
}
