variable "TAG" { default = "two" }
group "default" { targets = ["app", "extra"] }
target "app" {
  args = { B = "2" }
  annotations = ["index:c=d"]
  cache-from = ["x", "y"]
}
target "extra" {
  inherits = ["app"]
  contexts = { app = "target:app" }
}
