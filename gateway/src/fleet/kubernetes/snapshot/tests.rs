use k8s_openapi::api::discovery::v1::EndpointConditions;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::core::PartialObjectMetaExt as _;
use proptest::prelude::*;

use super::*;

fn service(namespace: &str, name: &str, names: &str) -> PartialObjectMeta<Service> {
    let annotations = [(labels::SERVED_NAMES.to_owned(), names.to_owned())].into();
    metadata(namespace, name, ObjectMeta { annotations: Some(annotations), ..ObjectMeta::default() })
        .into_response_partial()
}

fn metadata(namespace: &str, name: &str, rest: ObjectMeta) -> ObjectMeta {
    ObjectMeta { namespace: Some(namespace.to_owned()), name: Some(name.to_owned()), ..rest }
}

fn port(name: &str, port: Option<i32>) -> EndpointPort {
    EndpointPort { name: Some(name.to_owned()), port, ..EndpointPort::default() }
}

fn endpoint(address: &str, ready: Option<bool>, serving: Option<bool>) -> Endpoint {
    let conditions = EndpointConditions { ready, serving, terminating: None };
    Endpoint { addresses: vec![address.to_owned()], conditions: Some(conditions), ..Endpoint::default() }
}

fn ready(address: &str) -> Endpoint {
    endpoint(address, Some(true), Some(true))
}

fn slice(namespace: &str, service: &str, endpoints: Vec<Endpoint>) -> EndpointSlice {
    let labels = Some([(SERVICE_NAME.to_owned(), service.to_owned())].into());
    EndpointSlice {
        metadata: metadata(namespace, "any", ObjectMeta { labels, ..ObjectMeta::default() }),
        ports: Some(vec![port("metrics", Some(1)), port("grpc", Some(9000))]),
        endpoints: Some(endpoints),
        ..EndpointSlice::default()
    }
}

fn leaders_of(found: &Found) -> Vec<&str> {
    found.snapshot.gangs.iter().map(|gang| gang.leader.as_str()).collect()
}

#[test]
fn what_is_ready_is_found_and_what_is_not_is_doubted() {
    let endpoints = vec![
        ready("10.0.0.9"),
        endpoint("10.0.0.1", Some(false), Some(false)),
        endpoint("10.0.0.2", Some(false), Some(true)),
        endpoint("10.0.0.3", Some(false), None),
        endpoint("10.0.0.4", None, None),
        Endpoint { addresses: vec!["10.0.0.5".to_owned()], ..Endpoint::default() },
    ];
    let found = snapshot(&[service("a", "s", r#"["m"]"#)], &[slice("a", "s", endpoints)]);
    assert_eq!(leaders_of(&found), ["10.0.0.4:9000", "10.0.0.5:9000", "10.0.0.9:9000"]);
    let doubted: Vec<_> = found.snapshot.doubted.iter().map(|gang| gang.leader.as_str()).collect();
    assert_eq!(doubted, ["10.0.0.1:9000", "10.0.0.2:9000", "10.0.0.3:9000"]);
    assert_eq!(found.problems, Problems::default());
}

#[test]
fn an_address_is_the_first_one_with_the_port_named_grpc() {
    let services = [service("a", "s", r#"["m"]"#)];
    let mut several = ready("fd00::1");
    several.addresses.push("fd00::2".to_owned());
    let six = slice("a", "s", vec![several]);
    assert_eq!(leaders_of(&snapshot(&services, &[six])), ["[fd00::1]:9000"]);
    let odd = slice("a", "s", vec![ready("leader.example"), Endpoint::default(), ready("10.0.0.1")]);
    assert_eq!(leaders_of(&snapshot(&services, &[odd])), ["10.0.0.1:9000"]);
    for ports in [
        None,
        Some(vec![]),
        Some(vec![port("http", Some(9001))]),
        Some(vec![port("grpc", None)]),
        Some(vec![port("grpc", Some(0))]),
        Some(vec![port("grpc", Some(65536))]),
    ] {
        let slice = EndpointSlice { ports, ..slice("a", "s", vec![ready("10.0.0.1")]) };
        assert!(snapshot(&services, &[slice]).snapshot.gangs.is_empty());
    }
}

#[test]
fn names_are_those_of_the_service_in_the_namespace_of_the_slice() {
    let services = [service("a", "s", r#"["one", "both"]"#), service("b", "s", r#"["two", "both"]"#)];
    let slices = [
        slice("a", "s", vec![ready("10.0.0.1")]),
        slice("b", "s", vec![ready("10.0.0.2")]),
        slice("c", "s", vec![ready("10.0.0.3")]),
        slice("a", "other", vec![ready("10.0.0.4")]),
        EndpointSlice { metadata: ObjectMeta::default(), ..slice("a", "s", vec![ready("10.0.0.5")]) },
    ];
    let found = snapshot(&services, &slices).snapshot;
    let gang = |leader: &str, models: [&str; 2]| GangEndpoint {
        models: models.map(str::to_owned).to_vec(),
        leader: leader.to_owned(),
    };
    let gangs = vec![gang("10.0.0.1:9000", ["both", "one"]), gang("10.0.0.2:9000", ["both", "two"])];
    assert_eq!(found.gangs, gangs);
    assert_eq!(found.models, ["both", "one", "two"].map(str::to_owned).into());
}

#[test]
fn a_name_without_a_gang_stays_and_an_endpoint_in_two_slices_is_one() {
    let services = [service("a", "s", r#"["m"]"#), service("a", "empty", r#"["alone"]"#)];
    let both = slice("a", "s", vec![ready("10.0.0.1"), ready("10.0.0.2")]);
    let slices = [both, slice("a", "s", vec![ready("10.0.0.1")])];
    let found = snapshot(&services, &slices);
    assert_eq!(leaders_of(&found), ["10.0.0.1:9000", "10.0.0.2:9000"]);
    assert_eq!(found.snapshot.gangs[0].models, ["m"]);
    assert!(found.snapshot.models.contains("alone"));
}

#[test]
fn a_bad_annotation_leaves_out_its_own_gangs_and_nothing_else() {
    let many = format!("[{}]", ["\"m\""; MAX_NAMES + 1].join(","));
    let long = format!("[\"{}\"]", "m".repeat(MAX_NAME_BYTES + 1));
    for bad in ["", "m", "{}", "[1]", "[]", r#"[""]"#, &many, &long] {
        let services = [service("a", "bad", bad), service("a", "good", r#"["m"]"#)];
        let slices =
            [slice("a", "bad", vec![ready("10.0.0.1")]), slice("a", "good", vec![ready("10.0.0.2")])];
        let found = snapshot(&services, &slices);
        assert_eq!(leaders_of(&found), ["10.0.0.2:9000"], "{bad}");
        assert_eq!(found.problems.unnamed.keys().collect::<Vec<_>>(), ["a/bad"], "{bad}");
        assert_eq!(found.snapshot.models.len(), 1);
    }
    let without = metadata("a", "s", ObjectMeta::default()).into_response_partial();
    assert_eq!(snapshot(&[without], &[]).problems.unnamed["a/s"], NamesError::Missing);
}

#[test]
fn gangs_and_services_are_bounded_and_the_first_stay() {
    let address = |n: usize| format!("10.0.{}.{}", n / 256, n % 256);
    let endpoints: Vec<_> = (0..MAX_GANGS + 3).map(|n| ready(&address(n))).collect();
    let mut services: Vec<_> =
        (0..MAX_SERVICES + 2).map(|n| service("a", &format!("s{n:06}"), &format!("[\"m{n:06}\"]"))).collect();
    let last = slice("a", &format!("s{:06}", MAX_SERVICES + 1), vec![ready("10.1.0.0")]);
    let slices = [last, slice("a", "s000000", endpoints)];
    let found = snapshot(&services, &slices);
    assert_eq!((found.problems.gangs_over, found.problems.services_over), (3, 2));
    assert_eq!((found.snapshot.gangs.len(), found.snapshot.models.len()), (MAX_GANGS, MAX_SERVICES));
    assert_eq!(found.snapshot.gangs[0].leader, "10.0.0.0:9000");
    services.reverse();
    assert_eq!(snapshot(&services, &slices), found);
}

/// Services by number, with the names they serve, or with names that cannot be read.
fn any_services() -> impl Strategy<Value = BTreeMap<usize, Option<Vec<u8>>>> {
    let names = proptest::option::weighted(0.8, proptest::collection::vec(0..6_u8, 1..4));
    proptest::collection::btree_map(0..6_usize, names, 0..6)
}

/// The number of a Service, and endpoints: an address and its conditions.
type AnySlice = (usize, Vec<(u8, Option<bool>, Option<bool>)>);

fn any_slices() -> impl Strategy<Value = Vec<AnySlice>> {
    let condition = || proptest::option::of(any::<bool>());
    let endpoints = proptest::collection::vec((0..12_u8, condition(), condition()), 0..5);
    proptest::collection::vec((0..8_usize, endpoints), 0..8)
}

fn place(number: usize) -> (&'static str, String) {
    (["a", "b"][number % 2], format!("s{}", number / 2))
}

fn named(names: &[u8]) -> impl Iterator<Item = String> {
    names.iter().map(|name| format!("m{name}"))
}

proptest! {
    /// An address serves the names of all readable Services in whose slices it is; it is ready where one of them says so.
    #[test]
    fn every_gang_has_the_names_of_its_services(
        services in any_services(),
        slices in any_slices(),
        turn in 0..8_usize,
    ) {
        let mut expected: BTreeMap<u8, (bool, BTreeSet<String>)> = BTreeMap::new();
        for (number, endpoints) in &slices {
            let Some(Some(names)) = services.get(number) else { continue };
            for (address, ready, _) in endpoints {
                let (is_ready, models) = expected.entry(*address).or_default();
                *is_ready |= *ready != Some(false);
                models.extend(named(names));
            }
        }
        let mut built_services: Vec<_> = services.iter().map(|(number, names)| {
            let (namespace, name) = place(*number);
            let text = names.as_ref().map(|names| serde_json::to_string(&named(names).collect::<Vec<_>>()));
            service(namespace, &name, &text.transpose().unwrap().unwrap_or_default())
        }).collect();
        let mut built_slices: Vec<_> = slices.iter().map(|(number, endpoints)| {
            let (namespace, name) = place(*number);
            let endpoints = endpoints.iter().map(|(address, ready, serving)| {
                endpoint(&format!("10.0.0.{address}"), *ready, *serving)
            });
            slice(namespace, &name, endpoints.collect())
        }).collect();
        let found = snapshot(&built_services, &built_slices);
        let (mut gangs, mut doubted) = (Vec::new(), Vec::new());
        for (address, (ready, models)) in expected {
            let leader = format!("10.0.0.{address}:9000");
            let to = if ready { &mut gangs } else { &mut doubted };
            to.push(GangEndpoint { models: models.into_iter().collect(), leader });
        }
        prop_assert_eq!(&found.snapshot.gangs, &gangs);
        prop_assert_eq!(&found.snapshot.doubted, &doubted);
        let models: BTreeSet<_> = services.values().flatten().flat_map(|names| named(names)).collect();
        prop_assert_eq!(&found.snapshot.models, &models);
        prop_assert_eq!(found.problems.unnamed.len(), services.values().filter(|names| names.is_none()).count());

        // Objects come in any order.
        built_services.reverse();
        let turn = turn % built_slices.len().max(1);
        built_slices.rotate_left(turn);
        prop_assert_eq!(snapshot(&built_services, &built_slices), found);
    }
}
