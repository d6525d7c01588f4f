//! One story per test: holds, fences, lost connections, transactions, splits.

use std::sync::Arc;

use slotmesh_acl::Users;

use super::world::{Rights, World, command};
use crate::core::hold::Level;

fn check(world: &mut World, client: u32, want: &str) {
    world.settle();
    assert_eq!(world.take_replies(client), want);
}

#[test]
fn a_command_byte_by_byte_gives_the_same_as_at_once() {
    let mut all = command(&["SET", "a", "1"]);
    all.extend(command(&["MGET", "a", "b", "c", "a"]));
    all.extend_from_slice(b"PING\r\n");
    all.extend(command(&["GET", "a"]));
    let want = "+OK\r\n*4\r\n$1\r\n1\r\n$-1\r\n$-1\r\n$1\r\n1\r\n+PONG\r\n$1\r\n1\r\n";
    let mut world = World::new(3);
    let client = world.connect();
    world.send(client, &all);
    check(&mut world, client, want);
    let mut world = World::new(3);
    let client = world.connect();
    for byte in &all {
        world.send(client, &[*byte]);
        for lane in world.lanes() {
            world.run_node(lane, 1);
            world.deliver(lane, 1);
        }
    }
    check(&mut world, client, want);
}

#[test]
fn a_held_request_waits_and_runs_at_the_new_primary() {
    let mut world = World::new(1);
    let client = world.connect();
    world.send(client, &command(&["SET", "k", "1"]));
    world.settle();
    world.hold(0, "t1", 1_000_000);
    assert_eq!(
        world.core.level_of(0),
        Some(&Level::Held {
            epoch: 1,
            task_id: "t1".to_owned()
        })
    );
    world.send(client, &command(&["INCR", "k"]));
    check(&mut world, client, "+OK\r\n");
    let data = world.nodes[0].data.clone();
    let target = world.add_node(&[]);
    world.nodes[target].data = data;
    world.pass(20_000);
    world.switch(0, target);
    assert_eq!(world.core.level_of(0), Some(&Level::Applied { epoch: 2 }));
    check(&mut world, client, ""); // the user of epoch 2 does not exist yet
    world.nodes[target]
        .users
        .insert("px-2".to_owned(), Rights::Full);
    world.pass(2_000);
    check(&mut world, client, ":2\r\n");
    let sample = world
        .core
        .out
        .samples
        .iter()
        .find(|s| s.requests == 1)
        .unwrap();
    assert_eq!((sample.epoch, sample.longest_us), (2, 22_000));
}

#[test]
fn a_hold_with_requests_in_flight_is_reported_only_after_their_replies() {
    let mut world = World::new(1);
    let client = world.connect();
    world.settle();
    world.send(client, &command(&["INCR", "k"]));
    world.obey();
    world.hold(0, "t1", 1_000_000);
    assert_eq!(world.core.level_of(0), None);
    check(&mut world, client, ":1\r\n");
    assert!(matches!(world.core.level_of(0), Some(Level::Held { .. })));
}

#[test]
fn a_withdrawn_hold_releases_to_the_old_primary() {
    let mut world = World::new(1);
    let client = world.connect();
    world.settle();
    world.hold(0, "t1", 1_000_000);
    world.send(client, &command(&["INCR", "k"]));
    check(&mut world, client, "");
    world.route(0, |route| route.hold = None);
    check(&mut world, client, ":1\r\n");
    assert_eq!(world.core.level_of(0), Some(&Level::Applied { epoch: 1 }));
}

#[test]
fn a_hold_ends_by_itself_at_its_limit_and_does_not_start_again() {
    let mut world = World::new(1);
    let client = world.connect();
    world.settle();
    world.hold(0, "t1", 100_000);
    world.send(client, &command(&["INCR", "k"]));
    world.pass(99_000);
    check(&mut world, client, "");
    world.pass(2_000);
    check(&mut world, client, ":1\r\n");
    world.hold(0, "t1", 200_000);
    world.send(client, &command(&["INCR", "k"]));
    check(&mut world, client, ":2\r\n");
}

#[test]
fn fenced_writes_and_the_reads_after_them_run_again_in_order_at_the_new_epoch() {
    let mut world = World::new(1);
    let (a, b) = (world.connect(), world.connect());
    world.send(a, &command(&["SET", "k", "0"]));
    world.settle();
    world.take_replies(a);
    world.nodes[0]
        .users
        .insert("px-1".to_owned(), Rights::Fenced);
    let mut all = command(&["INCR", "k"]);
    all.extend(command(&["GET", "k"]));
    all.extend(command(&["EVAL", "x", "1", "k"]));
    world.send(a, &all);
    world.send(b, &command(&["GET", "k"]));
    world.settle();
    world.send(a, &command(&["GET", "k"]));
    world.settle();
    assert_eq!(world.take_replies(a), "");
    let target = world.add_node(&[("px-2", Rights::Full)]);
    world.nodes[target].data = world.nodes[0].data.clone();
    world.switch(0, target);
    check(&mut world, a, ":1\r\n$1\r\n1\r\n:2\r\n$1\r\n2\r\n");
    assert_eq!(world.nodes[target].executed, 2);
}

#[test]
fn an_undone_fence_is_found_out_by_asking_again() {
    let mut world = World::new(1);
    let client = world.connect();
    world.settle();
    world.nodes[0]
        .users
        .insert("px-1".to_owned(), Rights::Fenced);
    world.send(client, &command(&["INCR", "k"]));
    world.send(client, &command(&["INCR", "k"]));
    check(&mut world, client, "");
    world.pass(6_000);
    check(&mut world, client, "");
    world.nodes[0].users.insert("px-1".to_owned(), Rights::Full);
    world.pass(6_000);
    check(&mut world, client, ":1\r\n:2\r\n");
}

#[test]
fn a_refused_write_never_runs_after_a_later_one_of_its_client() {
    let mut world = World::new(1);
    let (a, b) = (world.connect(), world.connect());
    world.settle();
    world.nodes[0]
        .users
        .insert("px-1".to_owned(), Rights::Fenced);
    world.send(a, &command(&["SET", "k", "1"]));
    world.send(b, &command(&["INCR", "j"]));
    world.send(a, &command(&["SET", "k", "2"]));
    world.obey();
    world.run_node(0, 2);
    world.nodes[0].users.insert("px-1".to_owned(), Rights::Full); // undone at the worst moment
    world.settle();
    world.pass(6_000);
    world.settle();
    let reply = world.take_replies(a);
    assert!(
        reply.starts_with("-ERR slotmesh: ") && reply.ends_with("\r\n+OK\r\n"),
        "{reply}"
    );
    check(&mut world, b, ":1\r\n");
    world.send(a, &command(&["GET", "k"]));
    check(&mut world, a, "$1\r\n2\r\n");
}

#[test]
fn a_request_that_waits_too_long_gets_an_error_and_later_ones_go_on() {
    let mut world = World::new(1);
    world.set_settings(|settings| settings.hold_budget_us = 50_000);
    let client = world.connect();
    world.settle();
    world.hold(0, "t1", 80_000);
    world.send(client, &command(&["INCR", "k"]));
    world.pass(51_000);
    world.settle();
    let reply = world.take_replies(client);
    assert!(
        reply.starts_with("-ERR slotmesh: ") && reply.contains("not executed"),
        "{reply}"
    );
    world.send(client, &command(&["INCR", "k"]));
    world.pass(30_000);
    check(&mut world, client, ":1\r\n");
    assert_eq!(world.core.counters.hold_overdue, 1);
}

#[test]
fn after_a_lost_connection_reads_run_again_and_sent_writes_are_unknown() {
    let mut world = World::new(1);
    let client = world.connect();
    world.settle();
    let mut all = command(&["GET", "k"]);
    all.extend(command(&["INCR", "k"]));
    all.extend(command(&["GET", "k"]));
    world.send(client, &all);
    world.obey();
    world.run_node(0, 2); // both ran, the answers are lost
    world.cut(0);
    world.pass(10_000);
    world.settle();
    let reply = world.take_replies(client);
    let (first, rest) = reply.split_at("$1\r\n1\r\n".len());
    assert_eq!(first, "$1\r\n1\r\n");
    assert!(rest.starts_with("-ERR slotmesh: connection to the shard's primary was lost"));
    assert!(rest.ends_with("unknown\r\n$1\r\n1\r\n"), "{rest}");
    assert_eq!(world.nodes[0].executed, 1, "a write ran twice");
}

#[test]
fn a_write_that_was_never_sent_is_kept_while_the_node_is_away() {
    let mut world = World::new(1);
    let client = world.connect();
    world.settle();
    world.nodes[0].down = true;
    world.cut(0);
    world.send(client, &command(&["INCR", "k"]));
    world.pass(10_000);
    check(&mut world, client, "");
    world.nodes[0].down = false;
    world.pass(300_000);
    check(&mut world, client, ":1\r\n");
}

#[test]
fn a_transaction_that_a_fence_refused_runs_once_at_the_new_epoch() {
    for commands_before_fence in 0..4 {
        let mut world = World::new(1);
        let client = world.connect();
        world.settle();
        world.send(client, &command(&["MULTI"]));
        world.send(client, &command(&["GET", "k"]));
        world.send(client, &command(&["INCR", "k"]));
        world.send(client, &command(&["EXEC"]));
        world.obey();
        world.run_node(0, commands_before_fence);
        world.nodes[0]
            .users
            .insert("px-1".to_owned(), Rights::Fenced);
        world.settle();
        let queued = "+OK\r\n+QUEUED\r\n+QUEUED\r\n";
        assert_eq!(
            world.take_replies(client),
            queued,
            "{commands_before_fence}"
        );
        let target = world.add_node(&[("px-2", Rights::Full)]);
        world.switch(0, target);
        check(&mut world, client, "*2\r\n$-1\r\n:1\r\n");
        assert_eq!(world.nodes[0].executed + world.nodes[target].executed, 1);
    }
}

#[test]
fn a_hang_up_of_the_old_primary_does_not_stop_the_new_epoch_for_ever() {
    let mut world = World::new(1);
    let client = world.connect();
    world.settle();
    world.send(client, &command(&["INCR", "k"]));
    world.obey(); // the node takes it and never answers
    let target = world.add_node(&[("px-2", Rights::Full)]);
    world.switch(0, target);
    world.send(client, &command(&["GET", "j"]));
    check_stuck(&mut world, client);
    world.pass(1_100_000);
    world.settle();
    let reply = world.take_replies(client);
    assert!(
        reply.contains("unknown") && reply.ends_with("$-1\r\n"),
        "{reply}"
    );
}

fn check_stuck(world: &mut World, client: u32) {
    world.obey();
    assert_eq!(world.take_replies(client), "");
}

#[test]
fn over_the_bound_of_held_bytes_a_client_is_not_read_and_goes_on_later() {
    let mut world = World::new(1);
    world.set_settings(|settings| settings.hold_bytes_max = 100);
    let client = world.connect();
    world.settle();
    world.hold(0, "t1", 500_000);
    for _ in 0..20 {
        world.send(client, &command(&["INCR", "k"]));
    }
    world.obey();
    let kept = world.core.sessions.get(client).unwrap().state.input.len();
    assert!(kept > 0, "back-pressure leaves bytes with the client");
    world.route(0, |route| route.hold = None);
    let want: String = (1..=20).map(|n| format!(":{n}\r\n")).collect();
    check(&mut world, client, &want);
}

#[test]
fn databases_never_mix_on_a_shared_connection() {
    let mut world = World::new(1);
    let (a, b) = (world.connect(), world.connect());
    world.send(a, &command(&["SELECT", "3"]));
    for _ in 0..3 {
        world.send(a, &command(&["INCR", "k"]));
        world.send(b, &command(&["INCR", "k"]));
        world.send(b, &command(&["INCR", "k"]));
    }
    check(&mut world, a, "+OK\r\n:1\r\n:2\r\n:3\r\n");
    check(&mut world, b, ":1\r\n:2\r\n:3\r\n:4\r\n:5\r\n:6\r\n");
}

#[test]
fn a_client_that_left_costs_the_others_nothing() {
    let mut world = World::new(3);
    let (a, b) = (world.connect(), world.connect());
    world.send(a, &command(&["MGET", "a", "b", "c", "d"]));
    world.send(a, &command(&["INCR", "k"]));
    world.send(a, b"*3\r\n$3\r\nSE");
    world.send(b, &command(&["INCR", "j"]));
    world.core.close_client(a);
    let c = world.connect(); // takes the slot of the one that left
    world.send(c, &command(&["INCR", "j"]));
    check(&mut world, b, ":1\r\n");
    check(&mut world, c, ":2\r\n");
}

#[test]
fn an_epoch_never_falls() {
    let mut world = World::new(1);
    let client = world.connect();
    world.settle();
    let target = world.add_node(&[("px-2", Rights::Full)]);
    world.switch(0, target);
    world.settle();
    world.route(0, |route| {
        route.epoch = 1;
        route.username = "px-1".to_owned();
        route.address = ([127, 0, 0, 1], 7000).into();
    });
    world.send(client, &command(&["INCR", "k"]));
    check(&mut world, client, ":1\r\n");
    assert_eq!(world.nodes[0].executed, 0);
}

#[test]
fn nothing_is_answered_before_login_when_a_password_is_set() {
    use sha2::Digest as _;
    let mut world = World::new(1);
    let hash: [u8; 32] = sha2::Sha256::digest(b"hunter2").into();
    world.set_settings(|settings| settings.users = Arc::new(Users::open(Some(hash))));
    let client = world.connect();
    world.send(client, &command(&["GET", "k"]));
    world.send(client, &command(&["AUTH", "nope"]));
    world.send(client, &command(&["AUTH", "default", "hunter2"]));
    world.send(client, &command(&["GET", "k"]));
    let want = "-NOAUTH Authentication required.\r\n\
        -WRONGPASS invalid username-password pair or user is disabled.\r\n+OK\r\n$-1\r\n";
    check(&mut world, client, want);
}

#[test]
fn nonsense_is_answered_as_redis_does_and_ends_that_client_only() {
    let mut world = World::new(1);
    let (a, b) = (world.connect(), world.connect());
    world.send(a, &command(&["INCR", "k"]));
    world.send(a, b"*1\r\n:5\r\nPING\r\n");
    world.send(b, &command(&["INCR", "k"]));
    check(
        &mut world,
        a,
        ":1\r\n-ERR Protocol error: expected '$', got ':'\r\n",
    );
    assert!(world.core.sessions.is_done(a));
    check(&mut world, b, ":2\r\n");
}

#[test]
fn a_client_has_a_bounded_number_of_requests_in_flight() {
    let mut world = World::new(1);
    let client = world.connect();
    let all: Vec<u8> = (0..3000).flat_map(|_| command(&["INCR", "k"])).collect();
    world.send(client, &all);
    let in_flight = world.core.sessions.get(client).unwrap().in_flight();
    assert_eq!(in_flight, crate::core::sessions::IN_FLIGHT_MAX);
    let want: String = (1..=3000).map(|n| format!(":{n}\r\n")).collect();
    check(&mut world, client, &want);
}

#[test]
fn a_client_changes_its_protocol_only_when_nothing_of_it_is_in_flight() {
    let mut world = World::new(1);
    let client = world.connect();
    let mut all = command(&["INCR", "k"]);
    all.extend(command(&["HELLO", "3", "SETNAME", "me"]));
    all.extend(command(&["INCR", "k"]));
    all.extend(command(&["CLIENT", "GETNAME"]));
    all.extend(command(&["GET", "none"]));
    world.send(client, &all);
    world.obey();
    assert_eq!(world.take_replies(client), "");
    world.settle();
    let reply = world.take_replies(client);
    assert!(
        reply.starts_with(":1\r\n%7\r\n$6\r\nserver\r\n$5\r\nredis\r\n"),
        "{reply}"
    );
    assert!(
        reply.contains("$5\r\nproto\r\n:3\r\n") && reply.ends_with(":2\r\n$2\r\nme\r\n$-1\r\n")
    );
    assert_eq!(world.lanes(), [0, 1], "a lane per protocol version");
}

#[test]
fn a_hold_of_a_resp3_client_is_served_at_the_new_primary_too() {
    let mut world = World::new(1);
    let client = world.connect();
    world.send(client, &command(&["HELLO", "3"]));
    world.send(client, &command(&["INCR", "k"]));
    world.settle();
    world.take_replies(client);
    world.hold(0, "t1", 1_000_000);
    world.send(client, &command(&["INCR", "k"]));
    let target = world.add_node(&[("px-2", Rights::Full)]);
    world.nodes[target].data = world.nodes[0].data.clone();
    world.switch(0, target);
    check(&mut world, client, ":2\r\n");
    assert_eq!(world.core.level_of(0), Some(&Level::Applied { epoch: 2 }));
}
