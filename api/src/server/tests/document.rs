use axum::http::StatusCode;
use serde_json::{Value, json};

use super::House;
use super::fake::id;
use crate::job;

async fn document(house: &House) -> Value {
    house.get("/openapi.json").await.json()
}

/// Every documented path answers with a status that the document names.
#[tokio::test]
async fn every_documented_path_answers() {
    let house = House::new();
    house.fake.log.lock().expect("lock").push(crate::control::LogItem::End(crate::status::JobState::Failed));
    let document = document(&house).await;
    assert!(document["openapi"].as_str().expect("version").starts_with("3.1"), "{}", document["openapi"]);
    let mut count = 0;
    for (path, item) in document["paths"].as_object().expect("paths") {
        for (method, operation) in item.as_object().expect("an item") {
            let name = match path.split('/').nth(1) {
                Some("nodes") => "a".into(),
                Some("packages" | "agent") => "aa".repeat(32),
                _ => id().to_string(),
            };
            let file = if path.starts_with("/docs") { "index.html" } else { "" };
            let concrete = path.replace("{n}", "1").replace("{id}", &name).replace("{file}", file);
            let body = match path.as_str() {
                "/jobs/purge" => r#"{"older_than": "0s"}"#,
                "/tokens" if method == "post" => r#"{"user": "eve", "role": "viewer"}"#,
                _ => "",
            };
            for prefix in ["", "/api/v1"] {
                let reply = house.call(&method.to_uppercase(), &format!("{prefix}{concrete}"), body).await;
                let status = reply.status.as_u16().to_string();
                let answers = operation["responses"].as_object().expect("responses");
                assert!(answers.contains_key(&status), "{method} {prefix}{concrete} answers {status}: {}", reply.text());
                assert_ne!(reply.status, StatusCode::NOT_FOUND, "{method} {concrete}");
            }
            assert!(operation["operationId"].is_string() && operation["summary"].is_string(), "{method} {path}");
            assert!(operation["responses"]["default"]["content"]["application/problem+json"].is_object(), "{method} {path}");
            count += 1;
        }
    }
    assert_eq!(count, 48);
}

/// Routes come in through `routes!` alone, which documents them.
#[test]
fn no_route_is_undocumented() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/server");
    for file in std::fs::read_dir(folder).expect("the doors").map(|entry| entry.expect("an entry").path()) {
        if file.is_file() {
            let text = std::fs::read_to_string(&file).expect("text");
            assert!(!text.contains(".route(") && !text.contains(".route_service("), "{}", file.display());
        }
    }
}

#[tokio::test]
async fn every_reference_has_its_target() {
    fn walk(value: &Value, document: &Value) {
        if let Some(target) = value.get("$ref").and_then(Value::as_str) {
            assert!(document.pointer(target.trim_start_matches('#')).is_some(), "{target}");
        }
        value.as_object().into_iter().flat_map(|map| map.values()).for_each(|v| walk(v, document));
        value.as_array().into_iter().flatten().for_each(|v| walk(v, document));
    }
    let house = House::new();
    let document = document(&house).await;
    walk(&document, &document);
}

/// The request form of a job names exactly what `parse` takes, with the defaults that it fills in.
#[tokio::test]
async fn the_request_schema_is_what_parse_takes() {
    fn resolve<'d>(schema: &'d Value, document: &'d Value) -> &'d Value {
        let alternatives = schema["oneOf"].as_array().into_iter().flatten();
        let target = std::iter::once(schema).chain(alternatives).find_map(|s| s["$ref"].as_str());
        target.map_or(schema, |target| document.pointer(target.trim_start_matches('#')).expect("target"))
    }
    fn walk(schema: &Value, document: &Value, at: &str, wrap: &dyn Fn(Value) -> Value) {
        let schema = resolve(schema, document);
        assert!(schema.get("required").is_none(), "{at} has required fields");
        for (name, property) in schema["properties"].as_object().into_iter().flatten() {
            let here = format!("{at}/{name}");
            // A value of no right type: known fields complain of it, unknown ones of their name.
            let faults = job::parse(&wrap(json!({name.as_str(): {"\u{1}": {}}})));
            if let Err(faults) = faults {
                assert!(faults.iter().all(|f| f.pointer != here || !f.detail.contains("not a known field")), "{here}: {faults:?}");
            }
            if resolve(property, document).get("properties").is_some() {
                walk(property, document, &here, &|inner| wrap(json!({name.as_str(): inner})));
            } else if let Some(default) = property.get("default").filter(|default| !default.is_null()) {
                assert!(job::parse(&wrap(json!({name.as_str(): default}))).is_ok(), "{here} = {default}");
            }
        }
    }
    let house = House::new();
    let document = document(&house).await;
    let body = &document["paths"]["/jobs"]["post"]["requestBody"]["content"]["application/json"]["schema"];
    let schema = resolve(body, &document);
    assert_eq!(schema["properties"]["world_size"]["default"], 1);
    assert_eq!(resolve(&schema["properties"]["worker"], &document)["properties"]["steps"]["default"], 2000);
    walk(body, &document, "", &|inner| inner);
    for (name, _) in serde_json::to_value(job::JobSpec::default_for(1)).expect("serializes").as_object().expect("an object") {
        assert!(schema["properties"].get(name).is_some(), "{name}");
    }
}

#[tokio::test]
async fn the_viewer_loads_nothing_from_elsewhere() {
    let house = House::new();
    let moved = house.get("/docs").await;
    assert_eq!((moved.status, moved.header("location")), (StatusCode::PERMANENT_REDIRECT, "/docs/index.html"));
    assert_eq!(house.get("/api/v1/docs").await.header("location"), "/api/v1/docs/index.html");
    let page = house.get("/docs/index.html").await;
    assert!(page.header("content-type").starts_with("text/html"));
    assert!(page.header("content-security-policy").contains("default-src 'self'"));
    assert!(!page.text().contains("http://") && !page.text().contains("https://"), "{}", page.text());
    for part in page.text().split('"').filter(|part| part.starts_with("./") || part.ends_with(".css") || part.ends_with(".js")) {
        let name = part.trim_start_matches("./");
        assert_eq!(house.get(&format!("/docs/{name}")).await.status, StatusCode::OK, "{part}");
    }
    let start = house.get("/docs/swagger-initializer.js").await.text();
    assert!(start.contains("../openapi.json") && start.contains("\"validatorUrl\": \"none\""), "{start}");
    assert!(!start.contains("http"), "{start}");
}
