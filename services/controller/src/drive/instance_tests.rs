//! Tasks of whole instances that gave up: they go on by themselves, or are undone.

use slotmesh_proto::{agent::v1 as agent, store::v1 as records};

use super::*;
use crate::drive::desk::Desk;

const PROVISION: records::task_record::Spec =
    records::task_record::Spec::Provision(records::ProvisionSpec {});
const DECOMMISSION: records::task_record::Spec =
    records::task_record::Spec::Decommission(records::DecommissionSpec {});

async fn gave_up(spec: records::task_record::Spec, choice: records::OperatorChoice) -> Desk {
    let state = match spec {
        records::task_record::Spec::Decommission(_) => records::InstanceState::Deleting,
        _ => records::InstanceState::Creating,
    };
    let task = records::TaskRecord {
        spec: Some(spec),
        state: records::TaskState::NeedsOperator.into(),
        choice: choice.into(),
        deadline_unix_ms: 2,
        ..records::TaskRecord::default()
    };
    let mode = records::shard_record::Mode::Provisioning(records::Provisioning {});
    Desk::with(&["n"], mode, state, task).await
}

fn report(desk: &Desk, state: agent::ProcessState, granted_epoch: u64) {
    desk.report(agent::NodeReport {
        node_id: "n".into(),
        state: state.into(),
        run_id: "run".into(),
        address: "a:2".into(),
        granted_epoch,
        ..agent::NodeReport::default()
    });
}

async fn act(desk: &mut Desk) -> Task {
    let task = desk.task();
    desk.driver.act_on_instance(&task).await.unwrap();
    desk.task().value
}

#[tokio::test]
async fn a_provision_that_gave_up_says_what_is_missing_and_goes_on_when_it_is_there() {
    let mut desk = gave_up(PROVISION, records::OperatorChoice::Unspecified).await;
    let waits = act(&mut desk).await;
    assert_eq!(waits.state, TaskState::NeedsOperator);
    let said = &waits.message;
    assert!(
        said.contains("node n on h-n") && said.contains("undo"),
        "{said}"
    );
    assert_eq!(act(&mut desk).await.event_count, waits.event_count, "once");

    report(&desk, agent::ProcessState::Running, 0);
    act(&mut desk).await;
    report(&desk, agent::ProcessState::Running, 1);
    assert_eq!(act(&mut desk).await.state, TaskState::Done);
    assert_eq!(desk.instance().unwrap().state, InstanceState::Running);
}

#[tokio::test]
async fn a_provision_that_is_undone_removes_what_it_made() {
    let mut desk = gave_up(PROVISION, records::OperatorChoice::Undo).await;
    let undone = act(&mut desk).await;
    assert_eq!(undone.spec, Spec::Decommission);
    assert_eq!((undone.state, undone.choice), (TaskState::Running, None));
    assert!(undone.deadline_ms > clock::now_ms());
    assert_eq!(desk.instance().unwrap().state, InstanceState::Deleting);
    report(&desk, agent::ProcessState::Removed, 0);
    assert_eq!(act(&mut desk).await.state, TaskState::Done);
    assert_eq!(desk.instance(), None);
}

#[tokio::test]
async fn a_removal_that_gave_up_ends_when_the_host_is_back() {
    let mut desk = gave_up(DECOMMISSION, records::OperatorChoice::Unspecified).await;
    let waits = act(&mut desk).await;
    assert_eq!(waits.state, TaskState::NeedsOperator);
    assert!(!waits.message.contains("undo"), "{}", waits.message);
    report(&desk, agent::ProcessState::Removed, 0);
    assert_eq!(act(&mut desk).await.state, TaskState::Done);
    assert_eq!(desk.instance(), None);
}

#[tokio::test]
async fn a_copy_that_is_under_way_is_in_the_tasks_record_and_its_events() {
    let task = records::TaskRecord {
        spec: Some(PROVISION),
        state: records::TaskState::Running.into(),
        ..records::TaskRecord::default()
    };
    let mode = records::shard_record::Mode::Provisioning(records::Provisioning {});
    let creating = records::InstanceState::Creating;
    let desk = Desk::with(&["n", "m"], mode, creating, task).await;
    desk.report(agent::NodeReport {
        node_id: "m".into(),
        copied_bytes: 30,
        copy_total_bytes: 100,
        ..agent::NodeReport::default()
    });
    let task = desk.task();
    desk.driver.note_copied(&task).await.unwrap();
    let noted = desk.task().value;
    assert_eq!((noted.copied.done, noted.copied.total), (30, 100));
    assert_eq!(noted.event_count, task.value.event_count + 1);
}
