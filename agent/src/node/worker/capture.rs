//! Has what only this process has kept before it follows another one.
//!
//! Invariant: the process follows only after the file is on disk and in the journal, or after a
//! bounded time in which that was not possible.

use std::time::Duration;

use slotmesh_proto::agent::v1::LostWrites;
use tokio::time::Instant;

use super::Worker;
use crate::{
    capture::{self, Kept, Plan, tail::Tail},
    fence::ADMIN_USER,
    handover::driver::chain,
    host::is_id,
    journal::record::{Captured, Fact},
    node::{Action, Assigned, Decision, files::make_private_dir},
    probe::Info,
};

/// A full disk may be seen to in this time; longer than that the shard should not be one replica
/// short.
const PATIENCE: Duration = Duration::from_secs(60);

impl Worker {
    /// An error leaves the process as it is, for another try.
    pub(super) async fn capture(
        &mut self,
        assigned: &Assigned,
        replid: &str,
        tail: Tail,
    ) -> Result<(), String> {
        let plan = self.plan(assigned, replid, tail).await?;
        let mut lost = LostWrites {
            instance_id: assigned.spec.instance_id.clone(),
            shard_id: assigned.spec.shard_id.clone(),
            epoch: self.lost_epoch(assigned),
            node_id: self.node_id.clone(),
            bytes: (plan.until + 1).saturating_sub(tail.from),
            ..LostWrites::default()
        };
        match self.keep(&plan).await {
            Ok(kept) => {
                tracing::warn!(
                    node = %self.node_id, epoch = lost.epoch, bytes = lost.bytes,
                    commands = kept.commands, complete = kept.complete, why = kept.why,
                    "the node had writes that its successor never got"
                );
                if !kept.sha256.is_empty() {
                    lost.file = name(&lost);
                }
                lost.commands = kept.commands;
                lost.complete = kept.complete;
                lost.sha256 = kept.sha256;
                kept.why.clone_into(&mut lost.why);
            }
            Err(why) => {
                let since = *self
                    .run
                    .capture_fails_since
                    .get_or_insert_with(Instant::now);
                if since.elapsed() < PATIENCE {
                    return Err(format!(
                        "writes that only this node has can't be kept, so it does not follow yet: {why}"
                    ));
                }
                tracing::error!(node = %self.node_id, epoch = lost.epoch, bytes = lost.bytes, %why, "lost writes could not be kept");
            }
        }
        let captured = Captured {
            run_id: self.run.run_id.clone(),
            lost: lost.clone(),
        };
        let journaled = self.host.journal.append([Fact::Captured(captured)]).await;
        journaled.map_err(|error| format!("journal: {}", chain(&error)))?;
        if !lost.file.is_empty() {
            self.host.reports.lost(&self.host.lost_dir, lost);
        }
        Ok(())
    }

    /// Of a node that has left its shard: as before it would follow. An error leaves it as it is, for
    /// another try; a process that is gone, or does not answer, has nothing that could be read.
    pub(super) async fn keep_before_removal(&mut self, assigned: &Assigned) -> Result<(), String> {
        // A whole instance that is deleted has no successor either.
        if self.removed || !assigned.spec.detached {
            return Ok(());
        }
        if self.process.is_none() && !self.adopt().await {
            return Ok(());
        }
        if !self.probe().await {
            return Ok(());
        }
        let Decision::Act(actions) = self.decide(assigned).await else {
            return Ok(());
        };
        for action in actions {
            if let Action::Capture { replid, tail } = action {
                self.capture(assigned, &replid, tail).await?;
            }
        }
        Ok(())
    }

    async fn keep(&self, plan: &Plan) -> Result<Kept, String> {
        make_private_dir(&self.host.lost_dir).map_err(|error| error.to_string())?;
        let plan = plan.clone();
        match tokio::task::spawn_blocking(move || capture::capture(&plan)).await {
            Ok(kept) => kept.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        }
    }

    async fn plan(
        &mut self,
        assigned: &Assigned,
        replid: &str,
        tail: Tail,
    ) -> Result<Plan, String> {
        let dir = self.dir.clone().ok_or("the node has no directory")?;
        let secret = dir.admin_secret().map_err(|error| error.to_string())?;
        let epoch = self.lost_epoch(assigned);
        let file = name(&LostWrites {
            instance_id: assigned.spec.instance_id.clone(),
            shard_id: assigned.spec.shard_id.clone(),
            epoch,
            node_id: self.node_id.clone(),
            ..LostWrites::default()
        });
        let control = self.admin().await.ok_or("the node does not answer")?;
        let info = Info::read(control, "default")
            .await
            .map_err(|error| chain(&error))?;
        let until = info.offset();
        let oldest = match info.text("repl_backlog_active") {
            "1" => info.number("repl_backlog_first_byte_offset"),
            _ => until + 1,
        };
        Ok(Plan {
            socket: dir.socket().to_owned(),
            user: ADMIN_USER.to_owned(),
            secret,
            replid: replid.to_owned(),
            oldest,
            tail,
            until,
            database: info.only_database().unwrap_or(0),
            file: self.host.lost_dir.join(file),
        })
    }

    /// The epoch at which this process was the primary.
    pub(super) fn lost_epoch(&self, assigned: &Assigned) -> u64 {
        let stood = self.host.journal.read(|memory| {
            let standing = memory.standing(&self.node_id);
            standing
                .filter(|s| s.run_id == self.run.run_id)
                .map(|s| s.epoch)
        });
        stood.unwrap_or_else(|| assigned.spec.epoch.saturating_sub(1))
    }
}

fn name(lost: &LostWrites) -> String {
    let part = |id: &str| {
        if is_id(id) {
            id.to_owned()
        } else {
            "x".to_owned()
        }
    };
    format!(
        "{}-{}-{}-{}.resp",
        part(&lost.instance_id),
        part(&lost.shard_id),
        lost.epoch,
        part(&lost.node_id)
    )
}
