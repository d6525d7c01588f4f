//! Writes down who serves, and how far a hand-over is, on a thread of its own.
//!
//! Invariant: whoever talks about clients never waits for the disk, because clients wait for him: both
//! files are synced, which on a busy disk takes as long as a client may be stopped, or longer. What is
//! known at the end is written before [`with_scribe`] returns.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use super::Office;

/// Told that there is news.
pub(super) struct Scribe<'a> {
    desk: &'a Desk<'a>,
    /// `None`: the system had no thread left.
    wake: Option<SyncSender<()>>,
}

impl Scribe<'_> {
    /// What is known by now is to be written.
    pub(super) fn news(&self) {
        match &self.wake {
            // Full: it has not begun to write the news before this.
            Some(wake) => drop(wake.try_send(())),
            None => self.desk.write(),
        }
    }

    /// As [`Scribe::news`], and it is to be told once it is written that everybody has come.
    pub(super) fn settled(&self) {
        self.desk.settled.store(true, Ordering::Release);
        self.news();
    }
}

struct Desk<'a> {
    office: &'a Office,
    settled: AtomicBool,
    tell: &'a (dyn Fn() + Sync),
}

impl Desk<'_> {
    fn write(&self) {
        let settled = self.settled.load(Ordering::Acquire);
        self.office.announce_again();
        self.office.report.write();
        if settled {
            (self.tell)();
        }
    }

    fn listen(&self, woken: &Receiver<()>) {
        while woken.recv().is_ok() {
            self.write();
        }
    }
}

/// Talks, with somebody at hand who writes, and who tells when it is written that everybody has come.
pub(super) fn with_scribe<T>(
    office: &Office,
    tell: &(dyn Fn() + Sync),
    talk: impl FnOnce(&Scribe<'_>) -> T,
) -> T {
    let desk = Desk {
        office,
        settled: AtomicBool::new(false),
        tell,
    };
    let (wake, woken) = sync_channel(1);
    std::thread::scope(|scope| {
        let desk = &desk;
        let thread = std::thread::Builder::new().name("scribe".to_owned());
        let started = thread.spawn_scoped(scope, move || desk.listen(&woken));
        let wake = match started {
            Ok(_) => Some(wake),
            Err(error) => {
                tracing::warn!(%error, "no thread to write files with: clients wait for the disk");
                None
            }
        };
        talk(&Scribe { desk, wake })
    })
}
