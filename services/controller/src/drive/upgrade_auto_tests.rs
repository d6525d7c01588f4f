//! Patches by themselves, in the records: who is given one, and how many at a time.

use slotmesh_proto::{agent::v1 as agent, store::v1 as records};
use slotmesh_task::Spec;
use slotmesh_topology::{
    artifact::{Artifact, Level, Product, SHA256_LENGTH, Version},
    wire,
};

use super::{super::write::encode_instance, *};
use crate::{drive::desk::Desk, leader::LeaderOutcome, store::keys};

/// A leader of an instance whose window is open, and a patch that is listed.
async fn desk(level: Option<Level>) -> Desk {
    let task = records::TaskRecord {
        spec: Some(records::task_record::Spec::Provision(
            records::ProvisionSpec {},
        )),
        state: records::TaskState::Done.into(),
        ..records::TaskRecord::default()
    };
    let serving = records::shard_record::Mode::Serving(records::Serving {});
    let desk = Desk::with(&["a", "b"], serving, records::InstanceState::Running, task).await;
    let instance = Instance {
        maintenance_window: open_now(),
        auto_upgrade: level,
        ..desk.instance().unwrap()
    };
    let artifact = Artifact {
        product: Product::Redis,
        version: Version::parse("7.0.16").unwrap(),
        level: Level::High,
        release_note: String::new(),
        sha256: [0; SHA256_LENGTH],
        source: "file:///opt/program".into(),
        created_unix_ms: 1,
    };
    let name = artifact.name();
    let txn = desk
        .driver
        .term
        .txn()
        .put(Key::Instance { instance: "r" }, encode_instance(&instance))
        .put(
            Key::Artifact { name: &name },
            keys::encode(wire::artifact::to_record(&artifact)),
        );
    let outcome = txn.commit(&*desk.driver.store).await.unwrap();
    let LeaderOutcome::Committed { revision } = outcome else {
        panic!("{outcome:?}");
    };
    desk.driver.mirror.shows(revision).await;
    desk.report_all(["a", "b"].map(node).to_vec());
    desk
}

/// A window of twelve hours that has been open for some, whatever the time is.
fn open_now() -> String {
    let hour = clock::now_ms() / (60 * 60 * 1_000) % 24;
    format!("{:02}:00-{:02}:00", (hour + 23) % 24, (hour + 11) % 24)
}

fn node(id: &str) -> agent::NodeReport {
    agent::NodeReport {
        node_id: id.into(),
        state: agent::ProcessState::Running.into(),
        run_id: format!("run-{id}"),
        engine_version: "7.0.15".into(),
        ..agent::NodeReport::default()
    }
}

/// What the instance is upgraded to, by open tasks.
fn upgrades(desk: &Desk) -> Vec<(String, bool)> {
    desk.driver.mirror.read(|s| {
        let tasks = s.tasks.values().map(|t| &t.value);
        let upgrade = |t: &slotmesh_task::Task| match &t.spec {
            Spec::Upgrade(u) => Some((u.engine.clone(), u.automatic && u.in_window)),
            _ => None,
        };
        tasks.filter_map(upgrade).collect()
    })
}

async fn look(desk: &mut Desk) {
    desk.driver.by_themselves.looked = None;
    desk.driver.upgrade_by_themselves().await.unwrap();
}

#[tokio::test]
async fn a_patch_begins_by_itself_once_and_in_the_window_only() {
    let mut desk = desk(Some(Level::Medium)).await;
    for _ in 0..3 {
        look(&mut desk).await;
        assert_eq!(upgrades(&desk), [("redis-7.0.16".to_owned(), true)]);
    }
}

#[tokio::test]
async fn nothing_begins_that_is_off_or_when_the_controllers_are_set_to_none_or_the_clock_has_jumped()
 {
    let mut off = desk(None).await;
    look(&mut off).await;
    assert!(upgrades(&off).is_empty());
    let mut none = desk(Some(Level::Low)).await;
    none.driver.by_themselves.at_a_time = 0;
    look(&mut none).await;
    assert!(upgrades(&none).is_empty());
    none.driver.by_themselves.at_a_time = 1;
    none.driver.rests_ms = 1;
    look(&mut none).await;
    assert!(upgrades(&none).is_empty());
    none.driver.rests_ms = 0;
    look(&mut none).await;
    assert_eq!(upgrades(&none).len(), 1);
}

#[tokio::test]
async fn between_two_rounds_nobody_looks() {
    let mut desk = desk(Some(Level::Low)).await;
    desk.driver.by_themselves.looked = Some(Instant::now());
    desk.driver.upgrade_by_themselves().await.unwrap();
    assert!(upgrades(&desk).is_empty());
}
