//! `slotmesh status`: what an operator should look at now, from everything that controllers say.
//!
//! Invariant: it is read only, and says nothing of what is well but how much of it there is.

use serde::Serialize;
use slotmesh_proto::{fleet::v1 as fleet, store::v1::TaskState, task::v1 as task};

use crate::{
    api::Api,
    failure::Failure,
    render::{Output, Text, show, table},
};

/// Tasks that wait for an operator that are shown; more are as many reasons to look.
const TASKS_MAX: u32 = 100;

/// What is shown.
#[derive(Debug, Clone, Default, Serialize)]
pub struct StatusView {
    /// Empty: nobody leads.
    pub leader: String,
    pub term: u64,
    pub hosts: usize,
    pub hosts_silent: u32,
    /// Why silent hosts make no failover now; empty: they do.
    pub failover_brake: String,
    pub shards: usize,
    /// Only those that do not serve, or whose primary looks lost.
    pub shards_in_trouble: Vec<TroubleView>,
    /// Those that wait for an operator.
    pub tasks_waiting: Vec<WaitingView>,
}

#[derive(Debug, Clone, Serialize)]
pub struct TroubleView {
    pub instance_id: String,
    pub shard_id: String,
    pub mode: String,
    pub message: String,
}

#[derive(Debug, Clone, Serialize)]
pub struct WaitingView {
    pub task_id: String,
    pub kind: String,
    pub instance_id: String,
    pub message: String,
    pub choices: Vec<String>,
}

/// Asks for all of it and shows it.
///
/// # Errors
/// As the controller answered.
pub async fn show_status(api: &mut Api, output: Output) -> Result<(), Failure> {
    Ok(show(output, &look(api).await?)?)
}

async fn look(api: &mut Api) -> Result<StatusView, Failure> {
    let leader = api
        .call(|api| async move { api.fleet().get_leader(fleet::GetLeaderRequest {}).await })
        .await?;
    let hosts = api
        .call(|api| async move { api.fleet().list_hosts(fleet::ListHostsRequest {}).await })
        .await?;
    let mut status = StatusView {
        leader: leader.address,
        term: leader.term,
        hosts: hosts.hosts.len(),
        hosts_silent: hosts.hosts_silent,
        failover_brake: hosts.failover_brake,
        ..StatusView::default()
    };
    for instance in api.describe_instances(&[]).await? {
        for shard in api.describe_shards(&instance.instance_id).await? {
            status.shards += 1;
            if shard.mode != "Serving" || !shard.message.is_empty() {
                status.shards_in_trouble.push(TroubleView {
                    instance_id: instance.instance_id.clone(),
                    shard_id: shard.shard_id,
                    mode: shard.mode,
                    message: shard.message,
                });
            }
        }
    }
    let filter = task::ListTasksRequest {
        states: vec![TaskState::NeedsOperator.into()],
        page_size: TASKS_MAX,
        ..task::ListTasksRequest::default()
    };
    let waiting = api
        .call(|api| {
            let filter = filter.clone();
            async move { api.tasks().list_tasks(filter).await }
        })
        .await?;
    status.tasks_waiting = waiting.tasks.into_iter().map(waits).collect();
    Ok(status)
}

fn waits(task: task::Task) -> WaitingView {
    WaitingView {
        choices: task.choices().map(crate::views::choice_name).collect(),
        task_id: task.task_id,
        kind: task.kind,
        instance_id: task.instance_id,
        message: task.message,
    }
}

impl Text for StatusView {
    fn text(&self) -> String {
        let leader = match self.leader.as_str() {
            "" => "nobody".to_owned(),
            address => format!("{address} (term {})", self.term),
        };
        let mut text = format!(
            "leader  {leader}\nhosts   {} connected, {} silent\nshards  {}, {} in trouble",
            self.hosts,
            self.hosts_silent,
            self.shards,
            self.shards_in_trouble.len()
        );
        if !self.failover_brake.is_empty() {
            text.push_str(&format!("\nbrake   {}", self.failover_brake));
        }
        if !self.shards_in_trouble.is_empty() {
            let rows = self.shards_in_trouble.iter().map(|s| {
                let (instance, shard) = (s.instance_id.clone(), s.shard_id.clone());
                [instance, shard, s.mode.clone(), s.message.clone()]
            });
            text.push('\n');
            text.push_str(&table(["INSTANCE", "SHARD", "MODE", "WHY"], rows));
        }
        if !self.tasks_waiting.is_empty() {
            let rows = self.tasks_waiting.iter().map(|t| {
                [
                    t.task_id.clone(),
                    t.kind.clone(),
                    t.instance_id.clone(),
                    t.choices.join("|"),
                    t.message.clone(),
                ]
            });
            text.push('\n');
            let head = ["TASK", "KIND", "INSTANCE", "RESOLVE", "WAITS FOR"];
            text.push_str(&table(head, rows));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_brake_and_a_suspected_primary_are_shown_and_what_is_well_is_only_counted() {
        let well = StatusView {
            leader: "h:1".into(),
            term: 7,
            hosts: 3,
            shards: 2,
            ..StatusView::default()
        };
        let text = well.text();
        assert!(text.contains("leader  h:1 (term 7)"), "{text}");
        assert!(!text.contains("brake"), "{text}");
        let trouble = TroubleView {
            instance_id: "r-1".into(),
            shard_id: "0".into(),
            mode: "Serving".into(),
            message: "2 of 3 hosts fell silent".into(),
        };
        let ill = StatusView {
            failover_brake: "failover braked: 2 of 3".into(),
            shards_in_trouble: vec![trouble],
            ..well
        };
        let text = ill.text();
        assert!(text.contains("brake   failover braked: 2 of 3"), "{text}");
        assert!(text.contains("2 of 3 hosts fell silent"), "{text}");
    }
}
