//! A node that could not append to its file, and can again, writes the file anew.
//!
//! Redis 7.0 opens a new part of its append-only file without O_APPEND. Where the disk fills up in the
//! middle of a write it cuts the part off again, but not its own place in the file: the next write
//! leaves a hole of zeros before it, and at its next start the engine refuses the whole file. Nobody
//! would notice until then. Invariant: after a failure to append, a rewrite is asked for until one has
//! succeeded, at most every [`AGAIN`].

use std::time::Duration;

use tokio::time::Instant;

use super::Worker;
use crate::probe::{Appending, Info};

/// A rewrite costs a fork and the writing of all data; one that fails finds its disk full again.
const AGAIN: Duration = Duration::from_secs(10);

/// What is known of a process's append-only file.
#[derive(Debug, Default)]
pub(super) struct Append {
    /// It may have a hole.
    suspect: bool,
    asked: Option<Instant>,
    /// The engine took the last request.
    accepted: bool,
    /// As it was noted last; `None`: not yet.
    whole: Option<bool>,
}

impl Append {
    /// Whether a rewrite is due.
    fn look(&mut self, seen: Appending, now: Instant) -> bool {
        if !seen.writes {
            self.suspect = true;
            // The rewrite before may have begun before this failure.
            (self.asked, self.accepted) = (None, false);
            return false;
        }
        if !self.suspect || seen.rewrites {
            return false;
        }
        if std::mem::take(&mut self.accepted) && seen.rewritten {
            (self.suspect, self.asked) = (false, None);
            return false;
        }
        if self
            .asked
            .is_some_and(|asked| now.duration_since(asked) < AGAIN)
        {
            return false;
        }
        self.asked = Some(now);
        true
    }
}

impl Worker {
    /// Notes whether the process's files have all that it has: who starts on them after it continues it
    /// only then. A file that waits for its first or next rewrite, after a full copy or a failure, does
    /// not.
    fn note_whole(&mut self, appending: Option<Appending>) {
        if let (Some(dir), Some(process), None) = (&self.dir, self.process, self.run.append.whole) {
            self.run.append.suspect |= dir.lacked(process.pid);
        }
        let is_whole = appending.is_some_and(|a| a.writes && a.rewritten && !a.rewrites)
            && !self.run.append.suspect;
        if self.run.append.whole == Some(is_whole) {
            return;
        }
        let (Some(dir), Some(process)) = (&self.dir, self.process) else {
            return;
        };
        let run_id = match is_whole {
            true => self.run.run_id.as_str(),
            false => "",
        };
        match dir.note_run(process.pid, run_id) {
            Ok(()) => self.run.append.whole = Some(is_whole),
            Err(error) => {
                tracing::warn!(node = %self.node_id, %error, "process of node not noted; who starts after it is not known to continue it");
            }
        }
    }

    /// Asks for a rewrite where one is due.
    pub(super) async fn renew_append_file(&mut self, seen: &Info) {
        let appending = seen.appending();
        self.note_whole(appending);
        let Some(appending) = appending else {
            return;
        };
        if !self.run.append.look(appending, Instant::now()) {
            return;
        }
        let Some(control) = self.admin().await else {
            return;
        };
        match control.call(&["BGREWRITEAOF"]).await {
            Ok(_) => {
                self.run.append.accepted = true;
                tracing::warn!(
                    node = %self.node_id,
                    "it could not append to its file for a while, and can again; the file is written anew"
                );
            }
            Err(error) => {
                tracing::warn!(node = %self.node_id, %error, "append-only file not written anew yet")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WELL: Appending = Appending {
        writes: true,
        rewrites: false,
        rewritten: true,
    };
    const FULL: Appending = Appending {
        writes: false,
        ..WELL
    };
    const BUSY: Appending = Appending {
        rewrites: true,
        ..WELL
    };
    const FAILED: Appending = Appending {
        rewritten: false,
        ..WELL
    };

    #[test]
    fn a_file_that_was_always_written_is_left_alone() {
        let mut append = Append::default();
        let now = Instant::now();
        assert!(
            [WELL, BUSY, FAILED]
                .into_iter()
                .all(|seen| !append.look(seen, now))
        );
    }

    #[test]
    fn one_rewrite_follows_a_failure_once_it_is_over() {
        let mut append = Append::default();
        let now = Instant::now();
        assert!(!append.look(FULL, now), "the disk is still full");
        assert!(append.look(WELL, now));
        append.accepted = true;
        assert!(!append.look(BUSY, now));
        assert!(!append.look(WELL, now));
        assert!(!append.look(WELL, now + AGAIN), "the file is new");
    }

    #[test]
    fn a_rewrite_that_failed_is_asked_for_again_but_not_at_once() {
        let mut append = Append::default();
        let now = Instant::now();
        append.look(FULL, now);
        assert!(append.look(WELL, now));
        assert!(
            !append.look(WELL, now),
            "it was refused, and not asked again at once"
        );
        append.accepted = true;
        assert!(!append.look(FAILED, now));
        assert!(append.look(FAILED, now + AGAIN));
        assert!(!append.look(FULL, now + AGAIN));
        assert!(
            append.look(WELL, now + AGAIN),
            "a new failure needs a new file"
        );
    }
}
