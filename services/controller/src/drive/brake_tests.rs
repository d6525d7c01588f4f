//! The brake on failovers is shown where operators look, not only logged.

use slotmesh_proto::store::v1 as records;

use crate::drive::desk::Desk;

#[tokio::test]
async fn hosts_that_fall_silent_together_are_shown_as_the_brake_until_they_are_back() {
    let task = records::TaskRecord {
        spec: Some(records::task_record::Spec::Provision(
            records::ProvisionSpec {},
        )),
        state: records::TaskState::Done.into(),
        ..records::TaskRecord::default()
    };
    let mode = records::shard_record::Mode::Serving(records::Serving {});
    let running = records::InstanceState::Running;
    let mut desk = Desk::with(&["a", "b", "c"], mode, running, task).await;
    let leases = |hosts: &[&str]| hosts.iter().map(|h| (*h).into()).collect();
    let all = ["h-a", "h-b", "h-c"];
    desk.leading
        .hub
        .hosts_known(leases(&all), Default::default());
    desk.driver.detect().await.unwrap();
    assert_eq!(desk.leading.hub.doubts().brake(), "");

    desk.leading
        .hub
        .hosts_known(leases(&["h-c"]), Default::default());
    desk.driver.detect().await.unwrap();
    let brake = desk.leading.hub.doubts().brake();
    assert!(
        brake.contains("failover braked: 2 of 3 hosts") && brake.contains("slotmesh failover"),
        "{brake}"
    );
    let numbers = desk.leading.hub.doubts().numbers();
    assert_eq!((numbers.hosts, numbers.silent), (3, 2));
    assert!(numbers.is_braked && numbers.brakes == 1);
    let suspected = desk.leading.hub.doubts().of(&("r".into(), "0".into()));
    assert!(suspected.contains("h-a"), "{suspected:?}");

    desk.leading
        .hub
        .hosts_known(leases(&all), Default::default());
    desk.driver.detect().await.unwrap();
    let numbers = desk.leading.hub.doubts().numbers();
    assert!(!numbers.is_braked && numbers.brakes == 1);
    assert_eq!((numbers.silent, numbers.suspected), (0, 0));
}
