//! Notes how much data a task has moved, so that every controller can say it.
//!
//! Invariant: it is progress for people: nothing is decided from it, and it is written seldom enough
//! for a copy of hours to leave no more than a hundred events.

use slotmesh_task::{Copied, State as TaskState, Task, copied};

use super::{DriveError, Driver, write::put_task};
use crate::{clock, mirror::Versioned};

impl Driver {
    /// Writes what has been moved since it was last written, if that is worth it.
    pub(super) async fn note_copied(&self, task: &Versioned<Task>) -> Result<(), DriveError> {
        let old = &task.value;
        if old.state != TaskState::Running {
            return Ok(());
        }
        let shards = self.mirror.read(|s| s.shards_of(&old.instance));
        let plain: Vec<_> = shards.into_iter().map(|s| s.value).collect();
        let now = self.hub.read(|fleet| copied::of(old, &plain, fleet));
        if !copied::is_worth_an_event(old, now, clock::now_ms()) {
            return Ok(());
        }
        let next = Task {
            copied: now,
            ..old.clone()
        };
        let txn = put_task(self.txn_on(task), next, "", "Copying", &words(now));
        // A race lost is made good by the next look.
        self.commit(txn).await.map(drop)
    }
}

fn words(copied: Copied) -> String {
    let Copied { done, total, lag } = copied;
    match (total, lag) {
        (0, lag) => format!("{lag} bytes are not applied by the next primary yet"),
        (total, 0) => format!("{done} of {total} bytes are copied"),
        (total, lag) => format!("{done} of {total} bytes are copied; {lag} are not applied yet"),
    }
}
