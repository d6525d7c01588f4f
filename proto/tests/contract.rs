//! The contract of the last release, against today's.
//!
//! `released/0.1.bin` is the descriptor set that release 0.1 was built with. Processes one release apart
//! talk to each other and read each other's records, so nothing in it may change its number, its type or
//! its name; what is gone must be reserved. To be replaced by the next release's at its end.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use prost::Message as _;
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FileDescriptorSet, ServiceDescriptorProto,
};

const RELEASED: &[u8] = include_bytes!("released/0.1.bin");

/// All that a set declares, by full names.
#[derive(Default)]
struct Contract {
    messages: BTreeMap<String, DescriptorProto>,
    enums: BTreeMap<String, EnumDescriptorProto>,
    services: BTreeMap<String, ServiceDescriptorProto>,
}

impl Contract {
    fn read(bytes: &[u8]) -> Self {
        let mut contract = Self::default();
        for file in FileDescriptorSet::decode(bytes).unwrap().file {
            let package = file.package().to_owned();
            for message in file.message_type {
                contract.add(&package, message);
            }
            for of in file.enum_type {
                contract
                    .enums
                    .insert(format!("{package}.{}", of.name()), of);
            }
            for service in file.service {
                let name = format!("{package}.{}", service.name());
                contract.services.insert(name, service);
            }
        }
        contract
    }

    fn add(&mut self, outer: &str, message: DescriptorProto) {
        let name = format!("{outer}.{}", message.name());
        for nested in message.nested_type.clone() {
            self.add(&name, nested);
        }
        for of in message.enum_type.clone() {
            self.enums.insert(format!("{name}.{}", of.name()), of);
        }
        self.messages.insert(name, message);
    }
}

/// What would no longer be understood, one line each.
fn broken(before: &Contract, now: &Contract) -> Vec<String> {
    let mut broken = Vec::new();
    for (name, old) in &before.messages {
        match now.messages.get(name) {
            Some(new) => broken.extend(broken_fields(name, old, new)),
            None => broken.push(format!("message {name} is gone")),
        }
    }
    for (name, old) in &before.enums {
        let Some(new) = now.enums.get(name) else {
            broken.push(format!("enum {name} is gone"));
            continue;
        };
        for value in &old.value {
            let kept = new
                .value
                .iter()
                .any(|v| (v.number(), v.name()) == (value.number(), value.name()));
            if !kept {
                broken.push(format!("{name}: {} = {}", value.name(), value.number()));
            }
        }
    }
    for (name, old) in &before.services {
        let methods = now.services.get(name).map_or(&[][..], |s| &s.method);
        for method in &old.method {
            let kept = methods.iter().any(|m| {
                m.name() == method.name()
                    && (m.input_type(), m.output_type())
                        == (method.input_type(), method.output_type())
                    && (m.client_streaming(), m.server_streaming())
                        == (method.client_streaming(), method.server_streaming())
            });
            if !kept {
                broken.push(format!("{name}/{}", method.name()));
            }
        }
    }
    broken
}

fn broken_fields(name: &str, old: &DescriptorProto, new: &DescriptorProto) -> Vec<String> {
    let mut broken = Vec::new();
    for field in &old.field {
        let said = format!("{name}.{} = {}", field.name(), field.number());
        match new.field.iter().find(|f| f.number() == field.number()) {
            Some(same) => {
                let shape = |f: &prost_types::FieldDescriptorProto| {
                    (
                        f.name().to_owned(),
                        f.r#type(),
                        f.label(),
                        f.type_name().to_owned(),
                    )
                };
                // One that may be left out is read by both in the same way.
                if shape(same) != shape(field) {
                    broken.push(said);
                }
            }
            None => {
                let number = field.number();
                let is_reserved = |r: &prost_types::descriptor_proto::ReservedRange| {
                    (r.start()..r.end()).contains(&number)
                };
                if !new.reserved_range.iter().any(is_reserved) {
                    broken.push(format!("{said} is gone and not reserved"));
                }
            }
        }
    }
    broken
}

#[test]
fn no_message_of_the_last_release_has_changed_its_meaning() {
    let before = Contract::read(RELEASED);
    assert!(
        before
            .messages
            .contains_key("slotmesh.store.v1.ShardRecord")
    );
    let now = Contract::read(slotmesh_proto::FILE_DESCRIPTOR_SET);
    let broken = broken(&before, &now);
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

#[test]
fn a_change_of_number_type_or_method_is_found() {
    let before = Contract::read(RELEASED);
    let mut now = Contract::read(RELEASED);
    let record = now
        .messages
        .get_mut("slotmesh.store.v1.ShardRecord")
        .unwrap();
    let epoch = record.field.iter_mut().find(|f| f.name() == "epoch");
    epoch.unwrap().number = Some(1_000);
    let report = now
        .messages
        .get_mut("slotmesh.agent.v1.NodeReport")
        .unwrap();
    let offset = report.field.iter_mut().find(|f| f.name() == "offset");
    offset
        .unwrap()
        .set_type(prost_types::field_descriptor_proto::Type::String);
    let tasks = now
        .services
        .get_mut("slotmesh.task.v1.TaskService")
        .unwrap();
    tasks.method.retain(|m| m.name() != "CancelTask");
    now.enums.remove("slotmesh.store.v1.NodeRole");
    let broken = broken(&before, &now);
    assert_eq!(broken.len(), 4, "{broken:?}");
}
