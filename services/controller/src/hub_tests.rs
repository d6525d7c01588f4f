//! Tests of the hub: which session counts, and what is forgotten.

use super::*;

fn hello() -> topology::Hello {
    topology::Hello {
        proxy_id: "p".into(),
        instance_id: "r".into(),
        ..topology::Hello::default()
    }
}

#[test]
fn an_old_session_that_ends_late_does_not_remove_the_new_one() {
    let hub = Hub::default();
    let old = hub.proxy_opened(hello());
    let new = hub.proxy_opened(hello());
    hub.proxy_closed(&"p".into(), old);
    assert_eq!(hub.read(|f| f.proxies.len()), 1);
    hub.proxy_closed(&"p".into(), new);
    assert_eq!(hub.read(|f| f.proxies.len()), 0);
}

#[test]
fn a_report_of_an_old_session_and_of_an_old_term_is_forgotten() {
    let hub = Hub::default();
    let register = || agent::Register {
        host_id: "h".into(),
        ..agent::Register::default()
    };
    let report = |run_id: &str| agent::HostReport {
        nodes: vec![agent::NodeReport {
            node_id: "n".into(),
            run_id: run_id.into(),
            ..agent::NodeReport::default()
        }],
        ..agent::HostReport::default()
    };
    let old = hub.host_opened(register());
    let new = hub.host_opened(register());
    hub.host_reported(&"h".into(), new, &report("now"));
    hub.host_reported(&"h".into(), old, &report("before"));
    assert_eq!(hub.read(|f| f.nodes[&"n".into()].run_id.clone()), "now");
    hub.begin_term();
    assert!(hub.read(|f| f.nodes.is_empty() && f.hosts.len() == 1));
}

#[test]
fn a_host_has_one_agent_at_a_time() {
    let hub = Hub::default();
    let register = |instance: &str| agent::Register {
        host_id: "h".into(),
        agent_instance: instance.into(),
        agent_address: "a:1".into(),
        ..agent::Register::default()
    };
    let session = hub.host_opened(register("x"));
    assert_eq!(hub.other_agent(&register("x")), None, "it comes back");
    assert_eq!(hub.other_agent(&register("y")), Some("a:1".into()));
    hub.host_closed(&"h".into(), session);
    assert_eq!(hub.other_agent(&register("y")), None);
}

#[test]
fn the_longest_hold_over_all_proxies_is_kept() {
    let hub = Hub::default();
    let session = hub.proxy_opened(hello());
    for longest_us in [700, 900, 300] {
        let hold = topology::HoldSample {
            shard_id: "0".into(),
            epoch: 5,
            longest_us,
            requests: 1,
        };
        let report = topology::Report {
            holds: vec![hold],
            ..topology::Report::default()
        };
        hub.proxy_reported(&"p".into(), session, report);
    }
    assert_eq!(hub.longest_hold_us(&"r".into(), &"0".into(), Epoch(5)), 900);
    assert_eq!(hub.longest_hold_us(&"r".into(), &"0".into(), Epoch(6)), 0);
    let known = |epoch| hub.holds_are_known(&"r".into(), &"0".into(), Epoch(epoch));
    assert!(known(5) && !known(6), "the only proxy has said it of one");
    hub.proxy_opened(topology::Hello {
        proxy_id: "q".into(),
        ..hello()
    });
    assert!(!known(5), "the other one has not");
}
